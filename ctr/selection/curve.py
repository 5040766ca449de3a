"""Quality over the number of fields: train a run again on its best k fields, for several k.

Each run is the first one with `data.drop`, so that columns of other fields are not read; with all fields it is the
first run again, bit for bit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.ctr.config import Config
from tessera.ctr.data.config import schema_of
from tessera.ctr.output_folders import claim
from tessera.ctr.report.curve_page import curve_page
from tessera.ctr.report.files import json_text
from tessera.ctr.selection.config import SelectionConfig
from tessera.ctr.selection.field_groups import field_groups
from tessera.ctr.selection.kept_runs import train_or_keep
from tessera.ctr.selection.ranked_run import rank_run
from tessera.ctr.selection.result import IMPORTANCE, PLACE
from tessera.distributed.atomic import write_text
from tessera.distributed.collectives import on_first_rank
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

CURVE, CURVE_PAGE = "curve.json", "curve.html"


def run_curve(
    config: Config,
    process: Process,
    run_dir: Path,
    method: str,
    counts: Sequence[int],
    split: str = "valid",
    repeats: int = 5,
    output: Path | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Train the run again on its best fields by `method`, on all ranks, for each count; runs that are there are kept.

    The ranking is the run's own, importance/<method>, made now if it is not there.

    Args:
        config: the run's, from `run_config`.
        counts: how many fields are kept; as many as there are is the run itself.
        output: default: importance/<method>-curve in the run folder. It has a run folder for each count.

    Returns the folder, and the points by count: "fields", "run" and the metrics of each split.

    Raises ConfigError: a count that cannot be, or a ranking that is not of this run's fields.
    """
    groups = {group.features for group in field_groups(schema_of(config.data))}
    for count in counts:
        if not 1 <= count <= len(groups):
            raise ConfigError(f"--curve {count}: the run has {len(groups)} fields; expected from 1 to {len(groups)}")
    ranking = run_dir / PLACE / method / IMPORTANCE
    if not on_first_rank(process, ranking.exists):
        rank_run(copy.deepcopy(config), process, run_dir, method, split, repeats)
    ranked = on_first_rank(process, lambda: _ranked(ranking))
    if set(ranked) != groups:
        other = sorted(set(ranked) ^ groups)[0]
        raise ConfigError(f"{ranking} is not of this run's fields: {' + '.join(other)} is in one of them alone")
    target = output or run_dir / PLACE / f"{method}-curve"
    on_first_rank(process, lambda: claim(target, "--output", "importance.py", [config.data.path]))
    points = []
    for count in sorted(set(counts)):
        folder = target / f"best-{count}"
        scores = train_or_keep(with_best(config, ranked, count, folder), process, folder)
        points.append({"fields": count, "run": str(folder), "splits": scores})
        about = {"version": 1, "method": method, "run": str(run_dir), "metric": config.trainer.early_stop.metric}
        if process.is_main:  # after every run: a curve that is stopped has said something
            told = about | {"points": points}
            write_text(target / CURVE, json_text(told) + "\n")
            write_text(target / CURVE_PAGE, curve_page(told, CURVE))
    return target, points


def counts_of(text: str) -> list[int]:
    """Return the numbers of a list with commas. Raises ConfigError: something else."""
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise ConfigError(f"--curve {text!r}; expected numbers of fields, as 5,10,20") from None


def with_best(config: Config, ranked: Sequence[tuple[str, ...]], count: int, run_dir: Path) -> Config:
    """Return the configuration of a run on the first `count` of the fields, without gates."""
    made = copy.deepcopy(config)
    left_out = [name for features in ranked[count:] for name in features]
    made.data.drop = [*made.data.drop, *left_out]
    made.selection = SelectionConfig()
    made.trainer.run_dir, made.trainer.resume = str(run_dir), "auto"
    tables = schema_of(made.data).tables
    if made.embedding.tables is not None:
        made.embedding.tables = {name: one for name, one in made.embedding.tables.items() if name in tables}
    return made


def _ranked(path: Path) -> list[tuple[str, ...]]:
    """Return the features of each field, most important first. Raises ConfigError: no ranking there."""
    try:
        return [tuple(one["features"]) for one in json.loads(path.read_text())["fields"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} cannot be read as a ranking; expected one that `tessera importance` wrote") from None
