"""The commands of the drill: their data, what they are called with, and what they must leave behind."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.ctr.daily.days import assert_same_life, write_days
from tests.ctr.daily.days import command as daily_arguments
from tests.ctr.train.states import (
    arguments,
    assert_same_end,
    newest,
    rows_of_state,
    tensors_of_state,
    times_trained,
    write_data,
)
from tests.drill.processes import Started

ROWS, EPOCHS, DAYS = 600, 2, 4
COUNTED = ["embedding.admission.kind=exact", "embedding.admission.threshold=1", "optimizer.sparse.name=adam"]
FINGERPRINTS = ("fingerprint", "contents")  # of the input
SCORES = ("auc", "logloss", "normalized_entropy", "calibration", "pr_auc", "expected_calibration_error")


class Job(ABC):
    """One command. It always works in the same folder `work`, as paths are part of what it saves; what it left there
    undisturbed is in `whole`.

    Attributes:
        ranks: of the command.
        seconds: that it takes undisturbed.
        bytes: that it writes, in blocks of a disk.
    """

    ranks = 2

    def __init__(self, whole: Path, work: Path) -> None:
        self.whole = whole
        self.prepare(work)
        work.mkdir()
        self.set_up(work)
        given, began = blocks_of(work), time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            started = Started(self.command(work), self.ranks, Path(scratch) / "output")
            assert started.wait(300) == [0] * self.ranks, started.said()
        self.seconds = time.monotonic() - began
        self.bytes = 4096 * (blocks_of(work) - given)
        work.rename(whole)

    @abstractmethod
    def prepare(self, work: Path) -> None:
        """Make what `set_up` copies from."""

    @abstractmethod
    def set_up(self, work: Path) -> None:
        """Put the input of the command below an empty folder."""

    @abstractmethod
    def command(self, work: Path) -> list[str]:
        """The script and its arguments, the same for the first start and all others."""

    @abstractmethod
    def check(self, work: Path) -> None:
        """Raise AssertionError where the end is not that of the undisturbed command."""

    def check_but_fingerprints(self, work: Path) -> None:
        """As `check`, where a bit of the input was flipped that no row depends on."""
        self.check(work)

    def files(self, work: Path, fault: str) -> list[Path]:
        """Files to damage: of the input and of what the command has written so far. Bits are flipped where checksums
        are promised, in what manifests list and in data."""
        found = [path for path in work.rglob("*") if path.is_file() and path.name != ".lock"]
        if fault == "file removed":  # without one of its files the input is another one, which no command can tell
            return [path for path in found if (work / "data") not in path.parents]
        if fault != "flipped bit":
            return found
        listed = [path for path in found if any((folder / "manifest.json").exists() for folder in path.parents)]
        return listed + [path for path in found if (work / "data") in path.parents]


class Train(Job):
    def prepare(self, work: Path) -> None:
        self._data = write_data(self.whole.with_name(f"{self.whole.name}-data"), ROWS)

    def set_up(self, work: Path) -> None:
        shutil.copytree(self._data, work / "data")

    def command(self, work: Path) -> list[str]:
        loop = ["trainer.resume=auto", "trainer.batch_size=30", "trainer.eval_every=20", f"trainer.epochs={EPOCHS}"]
        states = ["trainer.checkpoint.every=5", "trainer.checkpoint.full_every=3", "trainer.timeout_seconds=30"]
        return ["scripts/train.py", *arguments(work / "data", work / "run", *COUNTED, *loop, *states)]

    def check(self, work: Path) -> None:
        assert_same_end(work / "run", self.whole / "run")
        assert times_trained(newest(work / "run")).tolist() == [EPOCHS] * ROWS
        assert_same_report(work / "run", self.whole / "run")

    def check_but_fingerprints(self, work: Path) -> None:
        assert_same_end(work / "run", self.whole / "run", FINGERPRINTS)


class Daily(Job):
    def prepare(self, work: Path) -> None:
        self._data = write_days(self.whole.with_name(f"{self.whole.name}-data"), DAYS, 150)

    def set_up(self, work: Path) -> None:
        shutil.copytree(self._data, work / "data")

    def command(self, work: Path) -> list[str]:
        states = ["trainer.checkpoint.every=4", "trainer.checkpoint.full_every=3", "trainer.timeout_seconds=30"]
        more = [*COUNTED, *states, "trainer.batch_size=30", "daily.full_every=3", "embedding.ttl_days=2"]
        return ["scripts/daily.py", *daily_arguments(work / "data", work / "run", *more)]

    def check(self, work: Path) -> None:
        assert_same_life(work / "run", self.whole / "run")

    def check_but_fingerprints(self, work: Path) -> None:
        assert_same_life(work / "run", self.whole / "run", but=FINGERPRINTS)

    def check_but_publications(self, work: Path) -> None:
        """As `check`, where a publication was damaged, which was said, before others were made that build on it."""
        assert_same_life(work / "run", self.whole / "run", published=False)


class Evaluate(Job):
    ranks = 1

    def prepare(self, work: Path) -> None:
        train = Train(self.whole.with_name(f"{self.whole.name}-trained"), work)
        self._trained = train.whole

    def set_up(self, work: Path) -> None:
        shutil.copytree(self._trained / "data", work / "data", dirs_exist_ok=True)
        run = work / "run"
        shutil.copytree(self._trained / "run", run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))

    def command(self, work: Path) -> list[str]:
        output = ["--split", "valid", "--slice", "c", "--output", str(work / "scored")]
        return ["scripts/evaluate.py", str(work / "run"), f"data.path={work / 'data'}", *output]

    def check(self, work: Path) -> None:
        assert_same_report(work / "scored", self.whole / "scored")


class ApplyDelta(Job):
    """Brings a copy of the first publication up to the last one."""

    ranks = 1

    def prepare(self, work: Path) -> None:
        self._life = Daily(self.whole.with_name(f"{self.whole.name}-life"), work).whole / "run" / "published"

    def set_up(self, work: Path) -> None:
        shutil.copytree(self._life, work / "published")

    def command(self, work: Path) -> list[str]:
        return ["scripts/apply_delta.py", str(work / "published"), str(work / "served" / "model")]

    def check(self, work: Path) -> None:
        mine, other = work / "served/model", self.whole / "served/model"
        assert tensors_of_state(mine) == tensors_of_state(other)
        assert rows_of_state(mine) == rows_of_state(other)


JOBS = {"train.py": Train, "daily.py": Daily, "evaluate.py": Evaluate, "apply_delta.py": ApplyDelta}


def blocks_of(folder: Path) -> int:
    """Blocks of 4 KiB that the files below a folder take."""
    return sum(-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


def assert_same_report(mine: Path, other: Path) -> None:
    """The same numbers in report.json, and the same predictions of the same rows, each once."""
    assert _predictions(mine) == _predictions(other)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (mine, other)]
    for key in ("rows", "positives", "split", *SCORES):
        assert reports[0][key] == reports[1][key], key


def _predictions(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in sorted((folder / "predictions").rglob("*.parquet")):
        found += pq.read_table(path).to_pylist()
    return sorted(found, key=lambda row: (row["split"], row["row"]))
