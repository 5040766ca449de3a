"""Fault drill: jobs of four commands, a random fault at a random moment of each, then the same command until it ends.

    python -m tests.fault_drill --runs 200 --seed 1

Checked behind each fault: what the command leaves is what an undisturbed one leaves, every row counts once, each start
says at most one error and shows no trace, and every next start works, or refuses with a line until the damage is
undone.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.drill.damage import FAULTS, Damage, SmallDisk
from tests.drill.jobs import JOBS, Job
from tests.drill.processes import Started

LIMIT_SECONDS = 120.0  # a start that takes longer hangs
STARTS = 6  # of one command behind one fault, at most


class Failed(Exception):
    """The drill has found something."""


@dataclass
class Drill:
    """One fault in one job."""

    job: Job
    fault: str
    folder: Path
    draw: random.Random
    disk: SmallDisk | None = None

    def run(self) -> str:
        """Returns how it ended: "went on", or "refused until undone"."""
        work = self.folder
        if self.fault == "disk full":
            self.disk = SmallDisk(self.folder / "disk", self.draw.uniform(0.02, 1.0) * self.job.bytes)
            work = self.folder / "disk"
        try:
            self.job.set_up(work)
            damage = self._disturb(work)
            return self._start_until_done(work, damage)
        finally:
            if self.disk:
                self.disk.close()

    def _disturb(self, work: Path) -> Damage | None:
        """The first start, with the fault in it."""
        started = Started(self.job.command(work), self.job.ranks, self.folder / "output")
        damage = None
        try:
            if self.fault != "disk full":
                started.wait(self.draw.uniform(0.0, 1.1 * self.job.seconds))
                damage = self._strike(started, work)
            self._end(started)
        finally:
            started.kill()
        return damage

    def _strike(self, started: Started, work: Path) -> Damage | None:
        if self.fault.startswith("kill"):
            ranks = range(self.job.ranks) if self.fault == "kill all" else [self.draw.randrange(self.job.ranks)]
            started.kill(ranks)
            return None
        if self.fault == "flipped bit":  # what is read while it changes is beyond any check
            started.kill()
        return Damage.do(self.fault, self.job.files(work, self.fault), self.draw)

    def _start_until_done(self, work: Path, damage: Damage | None) -> str:
        for refused in range(STARTS):
            started = Started(self.job.command(work), self.job.ranks, self.folder / "output")
            try:
                done = self._end(started)
            finally:
                started.kill()
            if done:
                self.job.check(work)
                return "refused until undone" if refused else "went on"
            if self.disk:
                self.disk.grow()
            elif refused == 1 and damage:
                damage.undo()
            elif refused > 1 or not damage:
                raise Failed(f"does not start again: {started.said()}")
        raise Failed("does not come to an end")

    def _end(self, started: Started) -> bool:
        """Wait until a start has ended; whether it did its work."""
        statuses = started.wait(LIMIT_SECONDS)
        said = started.said()
        if None in statuses:
            raise Failed(f"hangs: {statuses} {said}")
        for trace in ("Traceback", "--- Logging error", "Exception in thread", "Exception ignored", "terminate called"):
            if trace in said:
                raise Failed(f"shows a trace:\n{said}")
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        if len(errors) > 1:
            raise Failed(f"says {len(errors)} errors: {errors}")
        if set(statuses) == {0}:
            return True
        if not set(statuses) <= {0, 1, 2, -signal.SIGKILL}:
            raise Failed(f"ends with {statuses}: {said}")
        if not errors and -signal.SIGKILL not in statuses:
            raise Failed(f"ends with {statuses} and says no error: {said}")
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next ones count up")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--keep", type=Path, help="keep what failed below this folder")
    options = parser.parse_args(arguments)
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {name: JOBS[name](Path(scratch) / f"whole-{name}") for name in options.jobs}
        faults = [fault for fault in options.faults if fault != "disk full" or SmallDisk.possible(Path(scratch))]
        if len(faults) < len(options.faults):
            print("disk full is left out: no file system can be mounted here", flush=True)
        for seed in range(options.seed, options.seed + options.runs):
            draw = random.Random(seed)
            name, fault = draw.choice(options.jobs), draw.choice(faults)
            folder = Path(scratch) / f"run-{seed}"
            folder.mkdir()
            try:
                ended = Drill(jobs[name], fault, folder, draw).run()
                counts[name, fault, ended] += 1
            except (Failed, AssertionError) as error:
                ended = "FAILED"
                counts[name, fault, ended] += 1
                failures.append(seed)
                print(f"seed {seed} · {name} · {fault} · {type(error).__name__}: {error}", flush=True)
                if options.keep:
                    shutil.copytree(folder, options.keep / folder.name, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            print(f"seed {seed} · {name} · {fault} · {ended}", flush=True)
    print(table(counts))
    print(f"{options.runs} runs, {len(failures)} failed" + (f": seeds {failures}" if failures else ""))
    return 1 if failures else 0


def table(counts: Counter) -> str:
    """Counts of runs by command, fault and end, as markdown."""
    ends = sorted({end for _, _, end in counts})
    lines = [f"| command | fault | {' | '.join(ends)} |", "|---|---|" + "---|" * len(ends)]
    for name, fault in sorted({(name, fault) for name, fault, _ in counts}):
        lines.append(f"| {name} | {fault} | {' | '.join(str(counts[name, fault, end]) for end in ends)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    status = main()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(status)
