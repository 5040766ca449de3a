"""Fits of an experiment, each with its result in a file of its own: a run that was stopped goes on with what is
missing, and a table can be printed of what is there."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.ctr.config import load_config
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.atomic import write_text
from tessera.distributed.rank import Process

Result = dict[str, Any]
Setting = dict[str, float]


class Fits:
    """Results in a folder, one JSON file each: {made_of, result, cpu_seconds}. A result that was made of something else
    (other rows, epochs, settings) is made again."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.folder, self.read_only = folder, read_only

    def once(self, name: str, made_of: Mapping[str, Any], make: Callable[[], Result]) -> Result | None:
        """Return the result of that name, made now if it is not there; None if nothing may be made (`read_only`)."""
        path, wanted = self.folder / f"{name}.json", json.loads(json.dumps(made_of))
        if path.is_file():
            found = json.loads(path.read_text())
            if found["made_of"] == wanted:
                return found["result"]
        if self.read_only:
            return None
        began = time.process_time()
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        used = time.process_time() - began
        write_text(
            path, json.dumps({"made_of": wanted, "result": result, "cpu_seconds": round(used, 1)}, indent=1) + "\n"
        )
        print(f"{path}: {used:.0f} s", flush=True)
        return result

    def best_setting(
        self, name: str, grid: Mapping[str, Sequence[float]], fit: Callable[[str, Setting], Result | None]
    ) -> Setting | None:
        """Return the point of the grid whose fit has the highest `watched`; None if one is missing.

        `fit(name, setting)` returns the result of a fit.
        """
        settings = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
        results = [fit(f"tuning/{name}-" + "-".join(map(str, one.values())), one) for one in settings]
        values = [one["watched"] for one in results if one is not None]
        if len(values) < len(settings):
            return None
        return settings[max(range(len(settings)), key=values.__getitem__)]


def trained(overrides: Sequence[str], process: Process) -> Trainer:
    """Train as `tessera train` does, without its report; the best model is kept in the run folder."""
    trainer = Trainer(load_config(list(overrides), ""), process)
    trainer.begin()
    while not trainer.finished:
        for batch in trainer.readers.train_batches(trainer.engine, trainer.log):
            trainer.engine.train_step(batch)
        trainer.progress.epoch += 1
        trainer.evaluate()
    trainer.checkpoints.close()
    trainer.log.close()
    return trainer


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Return the mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def in_words(setting: Setting | None) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in (setting or {}).items())
