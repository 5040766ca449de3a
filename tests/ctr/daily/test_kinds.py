"""Other kinds of tables and of partitions lead the same life: killed inside a day, they end as if they had not been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.ctr.daily.days import assert_same_life, command, folder_of, key_of, records, served, write_day, write_days
from tests.ctr.train.warm_ranks import WarmRanks

KINDS = {
    "static": ["embedding=static", "embedding.rows=300", "optimizer.sparse.name=adagrad"],
    "int8": [
        "embedding.format=int8",
        "embedding.alpt.every=2",
        "embedding.oov=learned",
        "embedding.admission.kind=exact",
        "embedding.admission.threshold=2",
        "embedding.max_rows=400",
        "embedding.eviction=lru",
    ],
    "incctr": [
        "trainer.distil.kind=self",
        "trainer.distil.max_epochs=3",
        "optimizer.sparse.old_rows_factor=0.5",
        "daily.replay_rows=60",
    ],
    "tables": [
        "embedding.tables.row={dim: 2, optimizer: {name: adagrad, old_rows_factor: 0.5}}",
        "embedding.tables.c={ttl_days: null, format: int8, lr: 0.1}",
        "embedding.tables.d={dim: 3, max_rows: 400, eviction: lru}",
    ],
    "window": ["daily.method=window", "daily.window_days=2", "daily.epochs=2"],
}


@pytest.fixture(scope="module")
def ranks():
    server = WarmRanks("daily")
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_inside_a_day(ranks, tmp_path, kind):
    data, output = write_days(tmp_path / "data", 3, 200), tmp_path / "output"
    options = [*KINDS[kind], "trainer.checkpoint.every=3", "trainer.checkpoint.full_every=2", "daily.full_every=3"]

    def job(run_dir: Path) -> list[str]:
        static = kind == "static"  # whose rows have no age
        return [one for one in command(data, run_dir, *options) if not static or "ttl_days" not in one]

    assert ranks.run(2, job(tmp_path / "whole"), output) == [0, 0], output.read_text()
    for step in (4, 11):
        assert ranks.run(2, job(tmp_path / "killed"), output, end=(step, signal.SIGKILL, [0, 1])) == [-9, -9], (
            output.read_text()
        )
    assert ranks.run(2, job(tmp_path / "killed"), output, end=(11, signal.SIGTERM, [1])) == [75, 75], output.read_text()
    assert ranks.run(2, job(tmp_path / "killed"), output) == [0, 0], output.read_text()
    assert_same_life(tmp_path / "killed", tmp_path / "whole")
    published = [record["published"] for record in records(tmp_path / "whole")]
    assert published == (["full", "delta", "delta"] if kind in ("int8", "incctr", "tables") else ["full"] * 3)


@pytest.mark.slow
def test_hours(ranks, tmp_path):
    days, data, output = tmp_path / "days", tmp_path / "data", tmp_path / "output"
    hours = ["2026-01-01T22", "2026-01-01T23", "2026-01-02T00"]
    for number, hour in enumerate(hours):
        folder_of(data, hour).parent.mkdir(parents=True, exist_ok=True)
        write_day(days, number, 120).rename(folder_of(data, hour))
    first = command(data, tmp_path / "run", f"daily.to={key_of(0)}", "daily.report=true")
    assert ranks.run(1, first, output) == [0], output.read_text()
    assert [record["partition"] for record in records(tmp_path / "run")] == hours[:2]
    assert ranks.run(1, command(data, tmp_path / "run"), output) == [0], output.read_text()
    assert served(tmp_path / "run")["chain"] == hours
    assert (tmp_path / "run" / "days" / hours[0] / "report.html").exists()
