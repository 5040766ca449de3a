"""Read what a state says of the training that saved it, before anything of it is taken over."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tessera.ctr.config import Config
from tessera.ctr.renamed_keys import translate
from tessera.ctr.table_settings import settings_of
from tessera.distributed.saved.manifest import TRAINING, CheckpointError, check
from tessera.distributed.saved.states import Saved

COUNT = {str: int}
PATTERN = {
    "progress": {
        "step": int,
        "epoch": int,
        "now": float,
        "best": (float, None),
        "evaluations_since_best": int,
        "evaluated_step": float,  # -1 before the first evaluation
    },
    "schedule": {"steps": int, "factor": float},
    "log": {"metrics_bytes": int, "seconds": float, "tables_before": {str: float}},
    "reader": ({}, None),
    "distil": ({}, None),
    "tables": {},
    "of_ranks": [{"bad_rows": {str: COUNT}}],
    "config": {"optimizer": {"dense": {"name": str}, "sparse": {"name": str}}},
}


def check_goes_on(saved: Saved, own_command: str, config: Config) -> None:
    """Raise CheckpointError, one line, if a run of `own_command` with this configuration cannot go on from a state,
    whatever its tensors and rows are."""
    if saved.manifest["kind"] == "model":
        raise CheckpointError(
            f"{saved.name} is a model without what training needs besides; trainer.warm_start.path takes it"
        )
    training, where = saved.training, f"{saved.name}/{TRAINING}"
    command = "scripts/daily.py" if "daily" in training else "scripts/train.py"
    if command != own_command:
        raise CheckpointError(
            f"{saved.name} is a state of {command}, from which {own_command} cannot go on; go on with {command}, "
            "or name another trainer.run_dir (trainer.warm_start takes what fits)"
        )
    check(training, PATTERN, where)
    if training["progress"]["step"] != saved.step or len(training["of_ranks"]) != saved.ranks:
        found = f"step {training['progress']['step']} and {len(training['of_ranks'])} rank(s)"
        raise CheckpointError(f"{where} tells of {found}; the manifest of step {saved.step} and {saved.ranks}")
    for side in ("dense", "sparse"):
        before, now = training["config"]["optimizer"][side]["name"], getattr(config.optimizer, side).name
        if before != now:
            raise CheckpointError(
                f"{saved.name} was trained with optimizer.{side}.name {before}, now it is {now}; "
                "a run goes on with the same, trainer.warm_start takes what fits"
            )
    for table, described in training["tables"].items():
        before, now = described.get("optimizer"), settings_of(config, table)[1].name
        if before != now and config.embedding.kind == "dynamic":
            raise CheckpointError(
                f"{saved.name}: table {table} was trained with optimizer {before}, now it is {now} "
                f"(embedding.tables.{table}.optimizer); a run goes on with the same, trainer.warm_start takes what fits"
            )
        _check_decay(saved, table, described, config)


def _check_decay(saved: Saved, table: str, described: dict[str, Any], config: Config) -> None:
    """Raise CheckpointError for rows that note their decay otherwise than those of the configuration."""
    columns, sparse = described.get("columns"), settings_of(config, table)[1]
    before = columns.get("decay", ["", 0])[1] if isinstance(columns, dict) else 0
    now = 0 if not sparse.decay else 1 if not sparse.decay_count_power else 2
    if before != now and config.embedding.kind == "dynamic":
        kinds = ("without decay", "with decay", "with decay by counts")
        raise CheckpointError(
            f"{saved.name}: table {table} was trained {kinds[before]}, now it is trained {kinds[now]} "
            "(optimizer.sparse.decay, decay_count_power); a run goes on with the same, trainer.warm_start takes what "
            "fits"
        )


@contextmanager
def as_written(saved: Saved) -> Iterator[None]:
    """Raise CheckpointError, in one line, if parts of a state that this block takes over are missing or of another
    kind. Their readers know what they have written, so they do not look at each value first."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{saved.name} is not as this version writes states ({reason})") from error


def changed_keys(before: Any, config: Config) -> list[str]:
    """Return keys whose values are not those of the state, which may be of an earlier version:
    "trainer.epochs 1 -> 2"."""

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix[:-1]: node}
        return {key: value for name, one in node.items() for key, value in flat(one, f"{prefix}{name}.").items()}

    before = copy.deepcopy(before)
    translate(before)
    old, new = flat(before), flat(asdict(config))
    ignored = ("trainer.resume", "trainer.run_dir")
    return [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in ignored
    ]
