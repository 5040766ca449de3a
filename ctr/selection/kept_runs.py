"""Runs inside the folder of a command that trains several: those that are finished are kept when it starts again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tessera.ctr.config import Config
from tessera.ctr.report.result import settle_result
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.collectives import on_first_rank
from tessera.distributed.rank import Process


def train_or_keep(config: Config, process: Process, folder: Path) -> dict[str, dict[str, Any]]:
    """Train a run into a folder, on all ranks, unless it is there already; one that was stopped goes on.

    config: of the run; its folder is set here. Returns the metrics of each split by the best model.
    """
    config.trainer.run_dir, config.trainer.resume = str(folder), "auto"
    if not on_first_rank(process, partial(_is_done, folder)):
        Trainer(config, process).fit()
    return on_first_rank(process, partial(_scores, folder))


def _is_done(folder: Path) -> bool:
    if folder.exists():
        settle_result(folder)
    return (folder / "report.json").exists()


def _scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the metrics of each split by the best model, which a run scores last."""
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "eval":
            found[line["split"]] = {key: value for key, value in line.items() if key not in ("kind", "split")}
    return found
