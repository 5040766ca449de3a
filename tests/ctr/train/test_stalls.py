"""A rank that stands still, stopped or hung, is the one that is named; ranks that waited for it are not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.ctr.train.states import arguments, write_data

LIMIT = 5
SOON = {"STALE_SECONDS": 2.0, "HEARTBEAT_SECONDS": 0.1}
TRAINING, EVALUATION, SAVE = "step 7: backward", "evaluation of valid, batch 1", "step 10: saving"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", 1500, valid=400)


def said(ranks, data: Path, tmp_path: Path, world: int, at: tuple) -> list[str]:
    """Run a job in which a rank stands still; the errors that it says."""
    more = ["trainer.epochs=2", "trainer.checkpoint.every=5", f"trainer.timeout_seconds={LIMIT}"]
    more += ["trainer.batch_size=100", "trainer.eval_every=8", "trainer.checkpoint.overlap=false"]
    ranks.start(world, arguments(data, tmp_path / "run", *more), tmp_path / "output", at=at, **SOON)
    statuses = ranks.wait(60)
    assert None not in statuses and 0 not in statuses, (statuses, (tmp_path / "output").read_text())
    text = (tmp_path / "output").read_text()
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "rank", "stage"),
    [
        (3, 1, TRAINING),
        pytest.param(2, 1, TRAINING, marks=SLOW),
        pytest.param(3, 2, EVALUATION, marks=SLOW),
        pytest.param(2, 1, EVALUATION, marks=SLOW),
        pytest.param(2, 1, SAVE, marks=SLOW),
        pytest.param(3, 0, TRAINING, marks=SLOW),
        pytest.param(2, 0, EVALUATION, marks=SLOW),
        pytest.param(2, 0, SAVE, marks=SLOW),
    ],
)
def test_a_rank_that_is_stopped_is_named(ranks, data, tmp_path, world, rank, stage):
    """Rank 0 holds the store here, which then does not answer either."""
    lines = said(ranks, data, tmp_path, world, (stage, signal.SIGSTOP, [rank]))
    assert len(lines) == 1, lines
    if rank == 0:
        assert "rank 0 stands still" in lines[0]
    elif stage == SAVE:
        expected = "error: step-000000000010 cannot be saved: rank 1 stands still: its process was stopped (SIGSTOP)"
        assert lines[0].startswith(expected)
    else:
        assert lines[0].startswith(
            f"error: rank {rank} stands still: its process was stopped (SIGSTOP); it was last at"
        )


@pytest.mark.parametrize(
    ("world", "rank", "stage"),
    [
        (2, 1, EVALUATION),
        pytest.param(3, 1, TRAINING, marks=SLOW),
        pytest.param(3, 0, EVALUATION, marks=SLOW),
        pytest.param(2, 1, SAVE, marks=SLOW),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_stage(ranks, data, tmp_path, world, rank, stage):
    lines = said(ranks, data, tmp_path, world, (stage, "hang", [rank]))
    assert len(lines) == 1, lines
    if stage == SAVE:
        assert lines[0].startswith("error: step-000000000010 cannot be saved: for 5 s rank 1 has been busy elsewhere")
    else:
        assert lines[0].startswith(f"error: rank {rank} did not answer; it has been at {stage} for ")
