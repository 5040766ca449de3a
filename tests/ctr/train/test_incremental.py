"""What passes from one period's run to the next by a warm start: pending counts, the ages of rows, replayed rows."""

from __future__ import annotations

from pathlib import Path

from tessera.ctr.config import load_config
from tessera.ctr.data.reservoir import add_to_reservoir
from tessera.ctr.data.schema import Schema
from tests.ctr.train.states import arguments, newest, rows_of_state, times_trained, write_data

ROWS = 400
COMMON = ["trainer.batch_size=100", "embedding.admission.kind=exact", "embedding.admission.threshold=2"]
COMMON += ["optimizer.sparse.old_rows_factor=0.5"]


def number(value: bytes) -> int:
    return int.from_bytes(value, "little", signed=True)


def test_counts_rows_and_a_sample_go_from_day_to_day(ranks, tmp_path):
    """2 ranks, then 1. In each day's run an id of `row` occurs once: it has a row from the second day on."""
    first, second = tmp_path / "first", tmp_path / "second"
    days = [write_data(tmp_path / f"day{i}", ROWS, seed=i) for i in range(2)]
    assert ranks.run(2, arguments(days[0], first, *COMMON), tmp_path / "output") == [0, 0]
    before, waiting = (rows_of_state(newest(first), kind) for kind in ("rows", "waiting"))
    assert len(waiting["row"]) == ROWS and not before.get("row")
    config = load_config(arguments(days[0], first), "")
    sample = tmp_path / "sample.parquet"
    assert add_to_reservoir(None, str(days[0] / "train"), "day0", Schema(config.data.schema), 70, 1, sample) == 70
    more = [f"trainer.warm_start.path={first}", f"trainer.replay.path={sample}"]
    output = Path(tmp_path / "output")
    assert ranks.run(1, arguments(days[1], second, *COMMON, *more), output) == [0], output.read_text()
    after = rows_of_state(newest(second))
    assert len(after["row"]) == ROWS
    counts = times_trained(newest(second)).tolist()  # from admission on: once, and once more if it was replayed
    assert sorted(set(counts)) == [1, 2] and counts.count(2) == 70
    for name in ("c", "d"):
        for i, row in after[name].items():
            assert number(row["period"]) == (-1 if i in before[name] else 0)
    assert {number(row["period"]) for row in after["c"].values()} == {-1, 0}
