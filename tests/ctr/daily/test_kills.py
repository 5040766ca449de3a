"""SIGKILL at random moments of a run over days: the model, the records, the publications and the predictions are those
of the run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.ctr.daily.days import assert_same_life, command, times_trained, write_days
from tests.ctr.train.states import newest
from tests.ctr.train.test_resume_kills import QUICK, _sleep_until_end, _wait_for_save
from tests.ctr.train.warm_ranks import WarmRanks

WORLD = 2
OPTIONS = [
    "trainer.batch_size=20",
    "trainer.checkpoint.every=4",
    "trainer.checkpoint.full_every=3",
    "daily.full_every=3",
    "embedding.admission.kind=exact",
    "embedding.admission.threshold=1",
    "embedding.ttl_days=2",
]


def kill_until_done(ranks: WarmRanks, arguments: list[str], run_dir: Path, output: Path, seed: int) -> Counter:
    """Start the job, kill one rank or all at a random moment, start again, until it ends by itself."""
    draw, seen = random.Random(seed), Counter()
    while True:
        pids = ranks.start(WORLD, arguments, output, **QUICK)
        # At any time, or soon after a state or a publication is begun.
        below = draw.choice([None, "checkpoints", "published"])
        if below is None:
            _sleep_until_end(ranks, draw.uniform(0.0, 4.0))
        else:
            _wait_for_save(ranks, run_dir / below, 6.0)
            time.sleep(draw.uniform(0.0, 0.06))
        inside = [name for name in ("checkpoints", "published") if any((run_dir / name).glob(".partial-*"))]
        victims = pids if draw.random() < 0.5 else [draw.choice(pids)]
        alive = [pid for pid, status in zip(pids, ranks.wait(0), strict=True) if status is None]
        for pid in set(victims) & set(alive):
            os.kill(pid, signal.SIGKILL)
        if alive and len(victims) < WORLD:
            time.sleep(draw.uniform(0.0, 0.5))  # the other one may notice, or go on for a while
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        statuses = ranks.wait()
        if statuses == [0] * WORLD:
            return seen
        assert set(statuses) <= {0, 1, -signal.SIGKILL}, output.read_text()
        seen.update(["kills", *inside])


def check(tmp_path: Path, days: int, rows: int, least_kills: int, seed: int) -> None:
    data, ranks, total = write_days(tmp_path / "data", days, rows), WarmRanks("daily"), Counter()
    whole, output = tmp_path / "whole", tmp_path / "output"
    try:
        assert ranks.run(WORLD, command(data, whole, *OPTIONS), output) == [0] * WORLD, output.read_text()
        trained = times_trained(newest(whole), days, rows)
        assert trained[-1] == trained[-2] == [1] * rows and trained[0] == [0] * rows
        while total["kills"] < least_kills:
            killed = tmp_path / f"killed-{total['kills']}"
            total += kill_until_done(ranks, command(data, killed, *OPTIONS), killed, output, seed + total["kills"])
            total["runs"] += 1
            assert_same_life(killed, whole)
            print(f"survived: {dict(total)}", flush=True)
        said = output.read_text()
    finally:
        ranks.close()
    assert "passed over" not in said and "missing or damaged" not in said
    assert total["checkpoints"] >= least_kills // 8


@pytest.mark.slow
def test_a_few_kills_change_nothing(tmp_path):
    check(tmp_path, days=4, rows=160, least_kills=4, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_sixty_kills_change_nothing(tmp_path, part):
    check(tmp_path, days=6, rows=600, least_kills=20, seed=1000 * part + 2)
