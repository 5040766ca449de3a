"""Publications in a place that the user has chosen: a folder, or a bucket behind the S3 protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.ctr.daily.publish import check_publish_to
from tessera.embedding.errors import ConfigError
from tests.ctr.daily.days import command, key_of, served, write_days
from tests.ctr.train.warm_ranks import WarmRanks
from tests.object_store import CREDENTIALS

DAYS, ROWS = 3, 60


@pytest.fixture(scope="module")
def ranks():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server = WarmRanks("daily")
    yield server
    server.close()


def retrained(ranks: WarmRanks, folder: Path, run: str, *more: str, world: int = 1, status: int = 0) -> str:
    output = folder / f"output-{run}"
    output.unlink(missing_ok=True)
    statuses = ranks.run(world, command(folder / "data", folder / run, "daily.full_every=2", *more), output)
    assert statuses == [status] * world, output.read_text()
    return output.read_text()


@pytest.mark.slow  # test_life.py publishes into the run's folder, train/test_object_store.py writes to a store
@pytest.mark.parametrize("where", ["disk", "store"])
def test_models_are_published_where_the_run_is_told(where, ranks, store, tmp_path):
    """The same ones as in the run's folder, on 2 ranks; a rollback takes them back, and the days come again."""
    write_days(tmp_path / "data", DAYS, ROWS)
    local = tmp_path / "models"
    place = store.uri("models/published") if where == "store" else str(local / "published")

    def published() -> dict:
        return served(
            store.get_folder("models", tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")
            if where == "store"
            else local
        )

    retrained(ranks, tmp_path, "plain", world=2)
    retrained(ranks, tmp_path, "run", f"daily.publish_to={place}", world=2)
    assert not (tmp_path / "run" / "published").exists()
    whole = published()
    assert whole == served(tmp_path / "plain")
    assert whole["chain"] == [key_of(2)] and len(whole) == 2 + DAYS

    retrained(
        ranks, tmp_path, "run", f"daily.publish_to={place}", f"daily.rollback_to={key_of(1)}", "trainer.resume=auto"
    )
    assert published()["chain"] == [key_of(0), key_of(1)] and key_of(2) not in published()
    retrained(ranks, tmp_path, "run", f"daily.publish_to={place}", "trainer.resume=auto", world=2)
    assert published() == whole

    said = retrained(ranks, tmp_path, "other", f"daily.publish_to={place}", status=2)
    assert "holds publications, and this run has published none" in said and published() == whole


def test_a_place_with_files_of_others_or_in_the_data_is_refused(tmp_path):
    write_days(tmp_path / "data", 1, ROWS)
    for place, words in {
        tmp_path / "data" / "published": "lies inside",
        tmp_path: "contains",
        tmp_path / "file": "cannot be written to",
    }.items():
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigError, match=words):
            check_publish_to(str(place), str(tmp_path / "data"))
    for name in ("notes.txt", "2026-01-01-copy", ".partial-mine"):
        folder = tmp_path / f"models-{len(name)}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"holds {name}, which no run has published"):
            check_publish_to(str(folder), str(tmp_path / "data"))
        assert (folder / name).read_text() == "mine"


def test_a_place_that_is_not_there_is_one_line(store, tmp_path):
    elsewhere = store.uri("x").replace("s3://bucket", "s3://nobucket")
    with pytest.raises(ConfigError, match="there is no bucket nobucket"):
        check_publish_to(elsewhere, str(tmp_path))


def test_what_a_killed_job_has_left_does_not_stop_the_next(tmp_path):
    for name in (".partial-2026-01-01", ".deleted-2026-01-02T05", "2026-01-03"):
        (tmp_path / name).mkdir()
    (tmp_path / ".partial-latest").write_text(json.dumps({}))
    check_publish_to(str(tmp_path), "/nowhere")
