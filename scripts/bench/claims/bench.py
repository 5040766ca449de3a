"""Arms of a comparison: tuned alike with one seed, fitted with others, and put beside each other seed by seed."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tessera.ctr.runs.saved_model import load_model
from tessera.ctr.train.evaluate import evaluate
from tessera.distributed.rank import Process
from tessera.scripts.bench.claims.paired import paired, verdict, written
from tessera.scripts.bench.fits import Fits, Result, Setting, trained

TUNING_SEED = 0
COMMON = [
    *("trainer.device=cpu", "trainer.threads=1", "trainer.log_every=1000000", "export.check=never"),
    *(
        "optimizer.sparse.name=adam",
        "optimizer.sparse.lr=0.001",
        "optimizer.dense.name=adam",
        "optimizer.dense.lr=0.001",
    ),
    *("model.embedding_dim=8", "embedding.rows=100000", "trainer.early_stop.metric=auc"),
]
#: What every arm may choose from, on the valid split.
GRID: Mapping[str, Sequence[float]] = {"optimizer.sparse.lr": (0.003, 0.01)}


@dataclass(frozen=True)
class Arm:
    """One side of a comparison. after: an arm that is trained first, with its own settings, and whose rows this one
    begins with."""

    name: str
    overrides: tuple[str, ...]
    grid: Mapping[str, Sequence[float]] = field(default_factory=lambda: GRID)
    after: Arm | None = None


@dataclass(frozen=True)
class Rows:
    """A data set: how it is made for a seed, what a configuration says of it, and what it was made of. own_seeds: each
    seed has rows of its own, also that of the tuning; otherwise all seeds have the same ones. needs: a file that must
    be there."""

    name: str
    make: Callable[[int, Path], object]
    overrides: tuple[str, ...]
    made_of: Mapping[str, Any]
    own_seeds: bool = True
    needs: Path | None = None


class Row(NamedTuple):
    """A line of the page. holds: as `verdict` says, or words of its own."""

    claim: str
    paper: str
    where: str
    ours: str
    difference: str
    holds: str


class Bench:
    """Fits of arms on data sets. Rows that are drawn lie in `scratch`."""

    def __init__(self, fits: Fits, process: Process, scratch: Path, seeds: Sequence[int]) -> None:
        self.fits, self.process, self.scratch, self.seeds = fits, process, scratch, list(seeds)
        self.seconds: dict[str, float] = {}  # of one core, by fit
        self.to_the_end: dict[str, bool] = {}  # by fit that could stop early: whether it used all of its passes

    def once(self, name: str, made_of: Mapping[str, Any], make: Callable[[], Result]) -> Result | None:
        """Return the result of a fit, made now if it is not there, as `Fits.once`; its seconds are kept."""

        def timed() -> Result:
            began = sum(os.times()[:4])  # children's too
            result = make()
            return {**result, "seconds": round(sum(os.times()[:4]) - began, 1)}

        name = name.replace(" ", "_").replace(",", "")
        result = self.fits.once(name, made_of, timed)
        if result is not None:
            self.seconds[name] = result["seconds"]
        return result

    def folder_of(self, rows: Rows, seed: int) -> Path:
        """Return the folder of the rows of this seed, which are made if they are not there."""
        folder = self.scratch / f"{rows.name}-{seed if rows.own_seeds else 'all'}"
        if not folder.exists():
            rows.make(seed, folder)
        return folder

    def there(self, rows: Rows) -> bool:
        return self.fits.read_only or rows.needs is None or rows.needs.exists()

    def setting_of(self, rows: Rows, arm: Arm) -> Setting | None:
        """Return what of the arm's grid is best on valid with a seed of its own; None if that was not tried."""
        if not self.there(rows):
            return None
        fit = partial(self._tried, rows, arm)
        return self.fits.best_setting(f"{rows.name}/{arm.name}", arm.grid, fit) if arm.grid else {}

    def results_of(self, rows: Rows, arm: Arm) -> list[Result] | None:
        """Return the result of each seed; None if one is missing."""
        setting = self.setting_of(rows, arm)
        if setting is None:
            return None
        found = [self._fit(f"{rows.name}/{arm.name}-{seed}", rows, arm, setting, seed) for seed in self.seeds]
        results = [one for one in found if one is not None]
        return results if len(results) == len(found) else None

    def compared(self, claim: str, paper: str, rows: Rows, better: Arm, worse: Arm, margin: float | None = None) -> Row:
        """Return the line of a claim that the first arm's AUC is above the second one's or, with `margin`, no more than
        that below it."""
        if not self.there(rows):
            return absent(claim, paper, rows.name, f"{rows.needs} is not there")
        first, second = self.results_of(rows, better), self.results_of(rows, worse)
        if first is None or second is None:
            return absent(claim, paper, rows.name, "not run")
        auc = [[one["auc"] for one in results] for results in (first, second)]
        found = paired(*auc)
        ours = ", ".join(
            f"{arm.name} {statistics.fmean(one):.4f}" for arm, one in zip((better, worse), auc, strict=True)
        )
        return Row(claim, paper, rows.name, ours, written(found), verdict(found, margin))

    def _tried(self, rows: Rows, arm: Arm, name: str, setting: Setting) -> Result | None:
        return self._fit(name, rows, arm, setting, TUNING_SEED)

    def _fit(self, name: str, rows: Rows, arm: Arm, setting: Setting, seed: int) -> Result | None:
        before: list[str] | None = None
        if arm.after:
            chosen = self.setting_of(rows, arm.after)
            if chosen is None:
                return None
            before = [*arm.after.overrides, *_as_overrides(chosen)]
        own = [*COMMON, *rows.overrides, *arm.overrides, *_as_overrides(setting), f"trainer.seed={seed}"]
        made_of = {"rows": dict(rows.made_of), "overrides": own, "after": before}
        result = self.once(name, made_of, partial(self._fitted, rows, own, before, seed))
        if result is not None and "epochs" in result:
            most = int([one for one in own if one.startswith("trainer.epochs=")][-1].split("=")[1])
            self.to_the_end[name] = result["epochs"] >= most
        return result

    def _fitted(self, rows: Rows, own: list[str], before: list[str] | None, seed: int) -> Result:
        data = f"data.path={self.folder_of(rows, seed)}"
        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
            if before is not None:
                first = [*COMMON, *rows.overrides, *before, f"trainer.seed={seed}", data]
                trained([*first, f"trainer.run_dir={scratch}/first"], self.process)
                own = [*own, f"trainer.warm_start.path={scratch}/first/best", "trainer.warm_start.optimizer=false"]
            trainer = trained([*own, data, f"trainer.run_dir={scratch}/run"], self.process)
            load_model(trainer.engine.model, Path(scratch) / "run/best", self.process)
            reader = trainer.readers["test"]
            assert reader is not None
            found = evaluate(trainer.engine.model, reader, self.process)
            watched, epochs = trainer.progress.best, trainer.progress.epoch
        return {"watched": watched, "epochs": epochs, **{metric: found[metric] for metric in ("auc", "logloss")}}


def absent(claim: str, paper: str, where: str, why: str) -> Row:
    return Row(claim, paper, where, "", "", why)


def copied(source: Path) -> Callable[[int, Path], object]:
    """Return what makes a data set of files that are there."""
    return lambda seed, folder: shutil.copytree(source, folder)


def _as_overrides(setting: Setting) -> list[str]:
    return [f"{key}={value}" for key, value in setting.items()]
