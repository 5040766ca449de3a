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
import traceback
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
    """One fault in one job, which works in `work`. `output`: the file of what it says."""

    job: Job
    fault: str
    work: Path
    output: Path
    draw: random.Random
    disk: SmallDisk | None = None

    def run(self) -> str:
        """Returns how it ended: "went on", or "refused until undone"."""
        self.work.mkdir()
        if self.fault == "disk full":
            self.disk = SmallDisk(self.work)
        try:
            self.job.set_up(self.work)
            if self.disk:
                self.disk.leave_free(self.draw.uniform(0.0, 1.1) * self.job.bytes)
            return self._start_until_done(self._disturb())
        finally:
            if self.disk:
                self.disk.close()

    def _disturb(self) -> Damage | None:
        """The first start, with the fault in it."""
        started = Started(self.job.command(self.work), self.job.ranks, self.output)
        damage = None
        try:
            if self.fault != "disk full":
                started.wait(self.draw.uniform(0.0, 1.1 * self.job.seconds))
                damage = self._strike(started)
            self._end(started)
        finally:
            started.kill()
        return damage

    def _strike(self, started: Started) -> Damage | None:
        if self.fault.startswith("kill"):
            ranks = range(self.job.ranks) if self.fault == "kill all" else [self.draw.randrange(self.job.ranks)]
            started.kill(ranks)
            return None
        if self.fault == "flipped bit":  # what is read while it changes is beyond any check
            started.kill()
        return Damage.do(self.fault, self.job.files(self.work, self.fault), self.draw)

    def _start_until_done(self, damage: Damage | None) -> str:
        for refused in range(STARTS):
            started = Started(self.job.command(self.work), self.job.ranks, self.output)
            try:
                done = self._end(started)
            finally:
                started.kill()
            if done:
                return self._check(damage) or ("refused until undone" if refused else "went on")
            if self.disk:
                self.disk.grow()
            elif refused == 1 and damage:
                damage.undo()
            elif refused > 1 or not damage:
                raise Failed(f"does not start again: {started.said()}")
        raise Failed("does not come to an end")

    def _check(self, damage: Damage | None) -> str | None:
        """What is left is that of an undisturbed command. Where a file was damaged that the command had finished and
        does not read again, that holds for all but this file."""
        try:
            self.job.check(self.work)
            return None
        except Exception as error:
            if damage is not None and self._said_that_next_is_whole(damage):
                self.job.check_but_publications(self.work)
                return "next publication whole"
            if damage is not None and self.fault == "flipped bit" and (self.work / "data") in damage.path.parents:
                self.job.check_but_fingerprints(self.work)
                return "a bit that no row depends on"
            if damage is None or not damage.is_there():
                raise Failed(f"leaves something else: {type(error).__name__}: {error}") from error
        damage.undo()
        try:
            self.job.check(self.work)
        except Exception as error:
            raise Failed(f"leaves something else: {type(error).__name__}: {error}") from error
        return "damaged behind its end"

    def _said_that_next_is_whole(self, damage: Damage) -> bool:
        """A job was killed before it published, and what the publication builds on was damaged: it goes on with a
        whole one, and says so."""
        log = self.work / "run" / "train.log"
        named = "published" in damage.path.parts and log.is_file() and damage.path.is_relative_to(self.work / "run")
        return named and "is missing or damaged; the next one is whole" in log.read_text()

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
        work, output = Path(scratch) / "work", Path(scratch) / "output"
        jobs = {name: JOBS[name](Path(scratch) / f"whole-{name}", work) for name in options.jobs}
        faults = [fault for fault in options.faults if fault != "disk full" or SmallDisk.possible(Path(scratch))]
        if len(faults) < len(options.faults):
            print("disk full is left out: no file system can be mounted here", flush=True)
        for seed in range(options.seed, options.seed + options.runs):
            draw = random.Random(seed)
            name, fault = draw.choice(options.jobs), draw.choice(faults)
            try:
                ended = Drill(jobs[name], fault, work, output, draw).run()
                counts[name, fault, ended] += 1
            except Failed as error:
                ended = "FAILED"
                counts[name, fault, ended] += 1
                failures.append(seed)
                place = traceback.extract_tb(error.__traceback__)[-1]
                print(f"seed {seed} · {name} · {fault} · {place.line}: {error}", flush=True)
                if options.keep and work.exists():
                    shutil.copytree(work, options.keep / f"run-{seed}", dirs_exist_ok=True)
                    shutil.copy(output, options.keep / f"run-{seed}" / "output")
            shutil.rmtree(work, ignore_errors=True)
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
