"""A run that stops and goes on ends as one that never stopped, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.embedding.errors import ConfigError
from tests.ctr.train.states import (
    arguments,
    assert_same_end,
    metrics_of,
    newest,
    rows_of_state,
    times_trained,
    write_data,
)
from tests.ctr.train.warm_ranks import WarmRanks
from tests.ranks import run_script

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
    "int8": ["embedding.format=int8", "embedding.alpt.every=2", "trainer.checkpoint.full_every=2"],
    "tables": [
        "embedding.oov=learned",
        "embedding.alpt.every=2",
        "embedding.tables.row={dim: 2, ttl_days: 2, optimizer: {name: adam, state_format: bf16}, format: fp16}",
        "embedding.tables.c={format: int8, lr: 0.01, admission: {kind: exact, threshold: 2}}",
        "embedding.tables.d={dim: 3, optimizer: ftrl, max_rows: 900, eviction: lru, pooled_output_dist: always}",
        "trainer.checkpoint.full_every=3",
    ],
    "decay": [
        "optimizer.sparse.decay=0.5",
        "optimizer.sparse.decay_count_power=0.5",
        "optimizer.sparse.warmup_steps=10",
        "optimizer.sparse.schedule={kind: cosine, steps: 25}",
        "optimizer.dense.schedule={kind: exponential, steps: 7}",
        "optimizer.dense.ema.decay=0.9",
        "embedding.ttl_days=2",
        "embedding.tables.c={format: int8, decay: 0.2}",
        "embedding.tables.d={optimizer: ftrl, decay: 0}",
        "trainer.checkpoint.full_every=3",
    ],
    "decayed scales": ["optimizer.sparse.decay=0.5", "embedding.format=int8", "embedding.alpt.every=2"],
    "static": [
        "embedding=static",
        "embedding.rows=300",
        "optimizer.sparse.name=adagrad",
        "optimizer.dense.name=adagrad",
    ],
}


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


QUICK = ((2, "deltas"),)  # tables that differ: distributed/test_table_settings.py has their states
CASES = [*((1, setting) for setting in ("dynamic", "static")), *((2, setting) for setting in SETTINGS)]


@pytest.mark.parametrize(
    ("world", "setting"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_run_that_was_stopped_three_times_ends_as_one_that_never_was(ranks, data, tmp_path, setting, world):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(ranks, world, job(data, whole, setting), tmp_path)
    command = job(data, parts, setting)
    everyone = list(range(world))
    trained(ranks, world, command, tmp_path, -signal.SIGKILL, (9, signal.SIGKILL, everyone))
    # One rank is asked to stop; all stop behind the step in which they learn of it. 15 is the end of the first epoch.
    said = trained(ranks, world, command, tmp_path, 75, (14, signal.SIGTERM, [world - 1]))
    by = "SIGTERM" if world == 1 else "a signal to another rank"  # rank 0 says it
    assert f"step 15 · stopped by {by}, state saved" in said
    said = trained(ranks, world, command, tmp_path, -signal.SIGKILL, (24, signal.SIGKILL, everyone))
    assert "step 15 · goes on from" in said
    said = trained(ranks, world, command, tmp_path)
    assert "goes on from" in said  # from step 20, or 15 if that was not written yet
    assert_same_end(parts, whole)
    if setting == "dynamic":
        assert times_trained(newest(parts)).tolist() == [2] * ROWS


def damage(states: list[Path]) -> None:
    """Flip one bit among the rows of each state."""
    for state in states:
        path = next(state.glob("rows/c/*-of-*.parquet"))
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)


@pytest.mark.slow
def test_rows_that_turn_out_damaged_while_they_are_loaded(ranks, data, tmp_path):
    """The state before is taken; without one the run stops, and begins anew when the states are moved away."""
    trained(ranks, 2, job(data, tmp_path / "whole", "dynamic"), tmp_path)
    for name, damaged in (("newest", 1), ("all", 100)):
        command = job(data, tmp_path / name, "dynamic")
        trained(ranks, 2, command, tmp_path, 75, (14, signal.SIGTERM, [0]))
        states = sorted((tmp_path / name / "checkpoints").glob("step-*"), reverse=True)
        assert len(states) > 1
        damage(states[:damaged])
        said = trained(ranks, 2, command, tmp_path, 0 if name == "newest" else 2)
        assert f"{states[0].name} is passed over: rows/c/" in said
        assert ("goes on from" in said) == (name == "newest"), said
        assert ("none of the states in" in said) == (name == "all"), said
        if name == "all":
            (tmp_path / name / "checkpoints").rename(tmp_path / "away")
            trained(ranks, 2, command, tmp_path)
        assert_same_end(tmp_path / name, tmp_path / "whole")


def test_a_finished_run_only_reports_again(ranks, data, tmp_path):
    command = job(data, tmp_path / "run", "dynamic")
    trained(ranks, 1, command, tmp_path)
    before = metrics_of(tmp_path / "run")
    said = trained(ranks, 1, command, tmp_path)
    assert "step 30 · goes on from" in said
    assert metrics_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("setting", "rounding"),
    [
        ("dynamic", 2e-5),
        *(pytest.param(one, 1e-3, marks=pytest.mark.slow) for one in ("tables", "int8")),
        pytest.param("decay", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_ranks_come_and_go(ranks, data, tmp_path, setting, rounding):
    """2 -> 1 -> 3 -> 2 ranks: every row as often as before, the loss as if nothing had happened, to rounding.

    Where sums of gradients differ in the last bit, a lot of int8's stochastic rounding now and then falls differently.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["model.dropout=0.0", "embedding.admission.kind=exact", "embedding.admission.threshold=2"]
    trained(ranks, 2, job(data, whole, setting, *more), tmp_path)
    command = job(data, parts, setting, *more)
    for world, step in ((2, 6), (1, 13), (3, 21)):
        said = trained(ranks, world, command, tmp_path, 75, (step, signal.SIGTERM, [0]))
        assert f"step {step + 1} · stopped by SIGTERM" in said
    trained(ranks, 2, command, tmp_path)
    mine, other = (metrics_of(folder) for folder in (parts, whole))
    assert [line["step"] for line in mine] == [line["step"] for line in other]
    for one, two in zip(mine, other, strict=True):
        if one["kind"] == "train":
            assert one["rows"] == two["rows"]
            assert one["loss"] == pytest.approx(two["loss"], rel=rounding)
        if one["kind"] == "tables":
            assert one == two
    found, expected = (rows_of_state(newest(folder), numbers=False) for folder in (parts, whole))
    for name, rows in expected.items():
        assert {i: row["count"] for i, row in found[name].items()} == {i: row["count"] for i, row in rows.items()}
        assert {i: row["last_seen"] for i, row in found[name].items()} == {
            i: row["last_seen"] for i, row in rows.items()
        }


def test_a_state_elsewhere_begins_another_run(ranks, data, tmp_path):
    """trainer.resume=path: from there where this run has no state yet, then from its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    trained(ranks, 1, job(data, first, "dynamic"), tmp_path, 75, (9, signal.SIGTERM, [0]))
    state = newest(first)
    command = [*job(data, second, "dynamic"), f"trainer.resume={state}"]
    said = trained(ranks, 1, command, tmp_path, 75, (19, signal.SIGTERM, [0]))
    assert f"step 10 · goes on from {state}" in said
    said = trained(ranks, 1, command, tmp_path)
    assert "step 20 · goes on from" in said and str(state) not in said
    assert [line["step"] for line in metrics_of(second) if line["kind"] == "train"] == list(range(12, 31, 3))
    missing = [*job(data, tmp_path / "third", "dynamic"), f"trainer.resume={tmp_path}/nowhere"]
    said = trained(ranks, 1, missing, tmp_path, 2)
    assert "nowhere holds no saved state that can be read" in said


def test_the_second_job_on_a_folder_is_refused(ranks, data, tmp_path):
    command = job(data, tmp_path / "run", "dynamic", "trainer.epochs=50")
    (pid,) = ranks.start(1, command, tmp_path / "output")
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    done = run_script("scripts/train.py", *command)
    os.kill(pid, signal.SIGTERM)
    assert ranks.wait() == [75]
    assert done.returncode == 2
    assert f"run is in use by process {pid} on " in done.stderr.splitlines()[-1]


def test_what_does_not_fit_is_refused_in_one_line(ranks, data, tmp_path):
    command = job(data, tmp_path / "run", "dynamic")
    trained(ranks, 1, command, tmp_path, 75, (6, signal.SIGTERM, [0]))
    for change, problem in {
        "optimizer.sparse.name=sgd": "was trained with optimizer.sparse.name adam, now it is sgd",
        "embedding.tables.c.optimizer=sgd": "table c was trained with optimizer adam, now it is sgd",
        "model.embedding_dim=8": "found [1, 4] for tower/embed.numeric.weight; the model has [1, 8]",
        "trainer.seed=1": "reader state: trainer.seed found 1, expected 2026 as saved",
    }.items():
        said = trained(ranks, 1, [*command, change], tmp_path, 2)
        assert problem in said.splitlines()[-1], said
    with pytest.raises(ConfigError, match="trainer.resume is set but trainer.run_dir is null"):
        load_config(["trainer.resume=auto"], "")
