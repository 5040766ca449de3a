"""SIGKILL at random moments, also inside saves: nothing is lost, nothing is doubled, no state is unreadable."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.ctr.train.states import arguments, assert_same_end, newest, times_trained, write_data
from tests.ctr.train.warm_ranks import WarmRanks

WORLD = 2
OPTIONS = [
    "trainer.resume=auto",
    "trainer.batch_size=20",
    "trainer.eval_every=40",
    "trainer.checkpoint.full_every=3",
    "trainer.checkpoint.keep_last=2",
    "embedding.admission.kind=exact",
    "embedding.admission.threshold=1",
    "optimizer.sparse.name=adam",
]
QUICK = {"STALE_SECONDS": 0.6, "HEARTBEAT_SECONDS": 0.1, "LEAVE_SECONDS": 1.0}  # a dead rank is found sooner


def kill_until_done(
    ranks: WarmRanks, command: list[str], run_dir: Path, output: Path, seed: int, seconds: float
) -> Counter:
    """Start the job, kill one rank or all at a random moment, start again, until it ends by itself. `seconds` is what
    an undisturbed job took: kills come at any time of it, whatever the machine is doing."""
    draw, seen = random.Random(seed), Counter()
    states = run_dir / "checkpoints"
    while True:
        pids = ranks.start(WORLD, command, output, **QUICK)
        if draw.random() < 0.5:  # at any time: while ranks start, load, train or save
            _sleep_until_end(ranks, draw.uniform(0.0, seconds))
        else:  # soon after a save has begun
            _wait_for_save(ranks, states, 5.0)
            time.sleep(draw.uniform(0.0, 0.03))
        inside = any(states.glob(".partial-*"))
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
        seen.update(kills=1, one=len(victims) == 1, all=len(victims) > 1, inside_saves=inside)


def _sleep_until_end(ranks: WarmRanks, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and None in ranks.wait(0):
        time.sleep(0.02)


def _wait_for_save(ranks: WarmRanks, states: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    before = set(states.glob(".partial-*"))
    while time.monotonic() < end and not set(states.glob(".partial-*")) - before:
        if None not in ranks.wait(0):
            return
        time.sleep(0.002)


def check(tmp_path: Path, rows: int, epochs: int, least_kills: int, seed: int, save_every: int) -> None:
    data, ranks, total = write_data(tmp_path / "data", rows), WarmRanks(), Counter()
    whole, output = tmp_path / "whole", tmp_path / "output"

    def command(run_dir: Path) -> list[str]:
        more = [f"trainer.epochs={epochs}", f"trainer.checkpoint.every={save_every}"]
        return arguments(data, run_dir, *OPTIONS, *more)

    try:
        ranks.wait(0)  # imports are no part of what a job takes
        began = time.monotonic()
        assert ranks.run(WORLD, command(whole), output) == [0] * WORLD, output.read_text()
        seconds = time.monotonic() - began
        while total["kills"] < least_kills:
            total["runs"] += 1
            assert total["runs"] <= 10 + least_kills, f"kills come too late: {dict(total)}, a job takes {seconds:.1f} s"
            killed = tmp_path / f"killed-{total['runs']}"
            total += kill_until_done(ranks, command(killed), killed, output, seed + total["runs"], seconds)
            assert_same_end(killed, whole)
            assert times_trained(newest(killed)).tolist() == [epochs] * rows
            print(f"survived: {dict(total)}", flush=True)
        said = output.read_text()
    finally:
        ranks.close()
    assert "passed over" not in said  # no kill has left a state that looks complete and is not
    assert total["inside_saves"] >= least_kills // 5


def test_a_few_kills_change_nothing(tmp_path):
    check(tmp_path, rows=300, epochs=2, least_kills=2, seed=1, save_every=4)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_two_hundred_kills_change_nothing(tmp_path, part):
    check(tmp_path, rows=6000, epochs=2, least_kills=25, seed=1000 * part + 2, save_every=10)
