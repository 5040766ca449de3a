"""Days behind the S3 protocol: they are found, complete by their markers, and trained as days on a disk are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.ctr.daily.partitions import find_partitions, fingerprint
from tessera.ctr.data.errors import DataError
from tessera.distributed.saved.storage import Storage
from tests.ctr.daily.days import command, key_of, predictions, records, served, without_gauges, write_day, write_days
from tests.ctr.train.warm_ranks import WarmRanks
from tests.object_store import CREDENTIALS


def marked(root: str) -> list[str]:
    return [partition.key for partition in find_partitions(root, None, None) if partition.marked]


def test_days_are_found_with_their_markers_and_known_again(store, tmp_path):
    data, root = write_days(tmp_path / "data", 3, 60), store.uri("click data/daily").replace(" ", "%20")
    store.put_folder("click data/daily", data)
    there, here = find_partitions(root, None, None), find_partitions(str(data), None, None)
    assert [one.key for one in there] == [one.key for one in here] == [key_of(day) for day in range(3)]
    assert [fingerprint(one) for one in there] == [fingerprint(one) for one in here]
    assert there[0].path == root.replace("/daily?", f"/daily/day={key_of(0)}?")
    # Markers are seen, and a day that comes is seen at once: no listing is kept.
    assert marked(root) == []
    store.put(f"click data/daily/day={key_of(0)}/_SUCCESS", b"")
    assert marked(root) == [key_of(0)]
    for day in (1, 2):
        store.put(f"click data/daily/day={key_of(day)}/_SUCCESS", b"")
    assert marked(root) == [key_of(day) for day in range(3)]
    store.put_folder(f"click data/daily/day={key_of(3)}", write_day(tmp_path / "new", 3, 60))
    store.put(f"click data/daily/day={key_of(3)}/_SUCCESS", b"")
    assert marked(root)[-1] == key_of(3)
    store.put(f"click data/daily/day={key_of(3)}/notes.csv", b"mine")
    with pytest.raises(DataError, match="notes.csv.*endpoint_override") as raised:
        fingerprint(find_partitions(root, key_of(3), None)[0])
    assert f"/day={key_of(3)}/notes.csv?endpoint_override=" in str(raised.value)


@pytest.mark.slow
def test_a_run_over_days_is_the_same_wherever_days_and_states_are(store, tmp_path):
    """Killed inside the save of a day's end, and gone on with; publications and predictions are local and the same."""
    data, output = write_days(tmp_path / "data", 3, 120), tmp_path / "output"
    store.put_folder("days", data)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        ranks = WarmRanks("daily")
    try:
        here, there = command(data, tmp_path / "here"), command(Path("days"), tmp_path / "there")
        there = [f"data.path={store.uri('days')}" if one.startswith("data.path=") else one for one in there]
        there += [f"trainer.checkpoint.folder={store.uri('states')}"]
        assert ranks.run(2, here, output) == [0, 0], output.read_text()
        newest = sorted(path.name for path in (tmp_path / "here" / "checkpoints").iterdir())[-1]
        ranks.start(2, there, output, die=f"bucket/states/{newest}/rows/row/00001-of-00002.parquet")
        assert sorted(ranks.wait()) == [-9, 1], output.read_text()
        assert ranks.run(2, there, output) == [0, 0], output.read_text()
    finally:
        ranks.close()
    one, two = tmp_path / "here", tmp_path / "there"
    assert without_gauges(records(one)) == without_gauges(records(two))
    assert served(one) == served(two) and predictions(one) == predictions(two)
    assert Storage(store.uri("states")).names() == sorted(path.name for path in (one / "checkpoints").iterdir())
