"""Ctrl-C once saves a state as SIGTERM does, twice ends at once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.ctr.train.states import arguments, assert_same_end, newest, write_data

STEP = "step 7: backward"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", 1000)


def job(data: Path, run_dir: Path) -> list[str]:
    more = ["trainer.epochs=2", "trainer.batch_size=100", "trainer.eval_every=6", "trainer.checkpoint.every=100"]
    return arguments(data, run_dir, *more, "trainer.resume=auto")


@pytest.mark.parametrize(
    ("world", "rank", "number"),
    [
        (2, 1, signal.SIGINT),
        pytest.param(1, 0, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, 0, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_state_and_the_same_command_goes_on(ranks, data, tmp_path, world, rank, number):
    run_dir, output = tmp_path / "run", tmp_path / "output"
    assert ranks.run(world, job(data, run_dir), output, at=(STEP, number, [rank])) == [75] * world, output.read_text()
    assert newest(run_dir).name == "step-000000000009"
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number] if rank == 0 else "a signal to another rank"
    last = output.read_text().splitlines()[-1]
    assert last == f"step 9: stopped by {name}, state saved; trainer.resume=auto goes on"
    assert ranks.run(world, job(data, run_dir), output) == [0] * world, output.read_text()
    assert ranks.run(world, job(data, tmp_path / "whole"), output) == [0] * world
    assert_same_end(run_dir, tmp_path / "whole")


@pytest.mark.parametrize("world", [1, 2])
def test_ctrl_c_twice_ends_at_once(ranks, data, tmp_path, world):
    run_dir, output = tmp_path / "run", tmp_path / "output"
    ranks.start(world, job(data, run_dir), output, at=(STEP, "Ctrl-C twice", list(range(world))))
    assert ranks.wait(60) == [130] * world, output.read_text()
    assert not list((run_dir / "checkpoints").glob("step-*"))
    lines = [line for line in output.read_text().splitlines() if line.startswith("interrupted by Ctrl-C")]
    assert lines == [f"interrupted by Ctrl-C during {STEP}; what was saved before is as it was"]
    assert "Traceback" not in output.read_text()
