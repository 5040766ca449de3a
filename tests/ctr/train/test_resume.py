"""A run that stops and goes on ends as one that never stopped, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.ctr.train.states import arguments, assert_same_end, metrics_of, newest, times_trained, write_data
from tests.ctr.train.warm_ranks import WarmRanks

ROWS, BATCH = 1500, 100
#: name of a setting -> its overrides: filters, limits, expiry, dropout, both kinds of tables, several optimizers
SETTINGS = {
    "dynamic": ["trainer.eval_every=4"],
    "deltas": [
        "trainer.eval_every=6",
        "trainer.checkpoint.full_every=4",
        "embedding.max_rows=2000",
        "embedding.eviction=lru",
        "embedding.ttl_days=2",
        "optimizer.sparse.name=adam",
    ],
    "exact": ["embedding.admission.kind=exact", "embedding.admission.threshold=2", "optimizer.sparse.name=ftrl"],
    "sliding": [
        "embedding.admission.kind=sliding",
        "embedding.admission.threshold=2",
        "embedding.admission.capacity=4096",
        "trainer.checkpoint.overlap=false",
        "optimizer.sparse.name=adagrad",
        "optimizer.sparse.initial_accumulator=0.1",
    ],
    "static": [
        "embedding=static",
        "embedding.rows=300",
        "optimizer.sparse.name=adagrad",
        "optimizer.dense.name=adagrad",
    ],
}


@pytest.fixture(scope="module")
def ranks():
    server = WarmRanks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", ROWS)


def job(data: Path, run_dir: Path, setting: str, *more: str) -> list[str]:
    common = [f"trainer.batch_size={BATCH}", "trainer.epochs=2", "trainer.checkpoint.every=5", "trainer.resume=auto"]
    return arguments(data, run_dir, *common, *SETTINGS[setting], *more)


def trained(ranks: WarmRanks, world: int, command: list[str], folder: Path, status: int = 0, end=None) -> str:
    output = folder / "output"
    output.unlink(missing_ok=True)
    statuses = ranks.run(world, command, output, end=end)
    assert statuses == [status] * world, output.read_text()
    return output.read_text()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_was_stopped_three_times_ends_as_one_that_never_was(ranks, data, tmp_path, setting, world):
    if world == 1 and setting not in ("dynamic", "static"):
        pytest.skip("two ranks cover it")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(ranks, world, job(data, whole, setting), tmp_path)
    command = job(data, parts, setting)
    everyone = list(range(world))
    trained(ranks, world, command, tmp_path, -signal.SIGKILL, (9, signal.SIGKILL, everyone))
    # One rank is asked to stop; all stop behind the step in which they learn of it. 15 is the end of the first epoch.
    said = trained(ranks, world, command, tmp_path, 75, (14, signal.SIGTERM, [world - 1]))
    assert "step 5 · goes on from" in said and "step 15 · stopped by SIGTERM, state saved" in said
    said = trained(ranks, world, command, tmp_path, -signal.SIGKILL, (24, signal.SIGKILL, everyone))
    assert "step 15 · goes on from" in said
    said = trained(ranks, world, command, tmp_path)
    assert "step 20 · goes on from" in said or "step 15 · goes on from" in said  # was 20 written yet?
    assert_same_end(parts, whole)
    if setting == "dynamic":
        assert times_trained(newest(parts)).tolist() == [2] * ROWS


def test_a_finished_run_only_reports_again(ranks, data, tmp_path):
    command = job(data, tmp_path / "run", "dynamic")
    trained(ranks, 1, command, tmp_path)
    before = metrics_of(tmp_path / "run")
    said = trained(ranks, 1, command, tmp_path)
    assert "step 30 · goes on from" in said
    assert metrics_of(tmp_path / "run") == before
