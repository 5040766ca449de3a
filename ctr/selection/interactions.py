"""OptInter's two stages: search the way of each pair of fields, then train from scratch with the ways that won."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tessera.ctr.config import Config
from tessera.ctr.config_types import ParameterGroup
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.features import FeatureConfig
from tessera.ctr.instantiate import class_of
from tessera.ctr.models.optinter import CHOICES, OptInter
from tessera.ctr.network import build_tower
from tessera.ctr.output_folders import claim
from tessera.ctr.report.files import json_text
from tessera.ctr.selection.kept_runs import train_or_keep
from tessera.ctr.selection.pair_information import Pair, fields_to_cross, pair_information
from tessera.ctr.selection.retrain_files import write_choices
from tessera.ctr.train.state_parts import BEST
from tessera.distributed.atomic import write_text
from tessera.distributed.collectives import on_first_rank
from tessera.distributed.rank import Process
from tessera.distributed.saved.dense import load_tensors
from tessera.distributed.saved.manifest import SavedFolder, files_listed, read_manifest
from tessera.distributed.saved.storage import Storage
from tessera.embedding.errors import ConfigError

RESULT = "interactions.json"
VERSION = 1


@dataclass(frozen=True)
class SearchSettings:
    """pairs: so many may be memorised, those of most information; rows: that are counted for it; threshold: a pair of
    ids has a row once it is seen so often; lr: of the weights that choose; information: so many crosses of most
    information are trained beside the search, without products; None: no such run."""

    pairs: int = 50
    rows: int = 200_000
    threshold: int = 20
    lr: float = 0.001
    information: int | None = None
    retrain: bool = True

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        for name, least in (("pairs", 1), ("rows", 1), ("threshold", 1), ("information", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = "by-information" if name == "information" else name
                raise ConfigError(f"--{option} is {value}; expected at least {least}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"--lr is {self.lr}; expected a number above 0")


@dataclass(frozen=True)
class Interaction:
    """One pair of the result. memorise, factorise, naive: the shares of the search; information: the pair's gain in
    nats, None where it was not counted."""

    fields: Pair
    choice: str
    memorise: float
    factorise: float
    naive: float
    information: float | None


def select_interactions(
    config: Config, process: Process, target: Path, settings: SearchSettings
) -> tuple[list[Interaction], dict[str, dict[str, Any]]]:
    """Search on all ranks, choose, and train again; runs that are finished are kept.

    config: of model=optinter, which searches. target: gets interactions.json, conf/, and a folder for each run.

    Returns the pairs, and the metrics of each run by split.

    Raises ConfigError: a model or a data set that gives nothing to search, or a value that cannot be.
    """
    settings.check()
    _check(config)
    on_first_rank(process, lambda: claim(target, "--output", "select_interactions.py", [config.data.path]))
    schema = schema_of(config.data)
    crossed = {frozenset(one.of) for one in schema.crosses}
    names = fields_to_cross(schema)
    candidates = [pair for pair in itertools.combinations(names, 2) if frozenset(pair) not in crossed]
    if not candidates and not crossed:
        raise ConfigError(
            f"data.schema has {len(names)} features with one id per row; expected two at least, whose pairs can be "
            "memorised"
        )
    gains = pair_information(config, schema, process, candidates, settings.rows, settings.threshold)
    best = sorted(candidates, key=lambda pair: -gains[pair])
    runs = {}
    searched = with_crosses(config, best[: settings.pairs], settings.threshold)
    searched.optimizer.dense.groups = [ParameterGroup("alpha", settings.lr), *searched.optimizer.dense.groups]
    runs["search"] = train_or_keep(searched, process, target / "search")
    found = on_first_rank(process, lambda: _chosen(searched, target / "search", gains))
    chosen = with_choices(config, found, settings.threshold)
    plans = {"retrain": chosen} if settings.retrain else {}
    if settings.information is not None:
        crosses = with_crosses(config, best[: settings.information], settings.threshold)
        crosses.model["factorise"] = []
        plans["by-information"] = crosses
    _write(target, process, chosen, settings, found, runs)
    for name, plan in plans.items():
        runs[name] = train_or_keep(plan, process, target / name)
        _write(target, process, chosen, settings, found, runs)
    return found, runs


def with_crosses(config: Config, pairs: Sequence[Pair], threshold: int) -> Config:
    """Return the configuration with a cross of each pair, whose rare ids get no row."""
    made = copy.deepcopy(config)
    known = {str(_value(one, "name")) for one in made.data.schema.features}
    tables = dict(made.embedding.tables or {})
    for a, b in pairs:
        name = f"{a}_x_{b}"
        while name in known:
            name += "_"
        known.add(name)
        made.data.schema.features.append(FeatureConfig(name=name, kind="cross", of=[a, b]))
        tables[name] = {"admission": {"kind": "exact", "threshold": threshold}}
        if (pair_dim := made.model.get("pair_dim")) is not None and pair_dim < made.model["embedding_dim"]:
            tables[name]["dim"] = 1  # a cross has no vector of its own among the fields'
    made.embedding.tables = tables or None
    return made


def with_choices(config: Config, found: Sequence[Interaction], threshold: int) -> Config:
    """Return the configuration that trains from scratch with the ways that were chosen."""
    crossed = {frozenset(one.of): one.name for one in schema_of(config.data).crosses}
    memorised = [one.fields for one in found if one.choice == "memorise"]
    made = with_crosses(config, [pair for pair in memorised if frozenset(pair) not in crossed], threshold)
    left_out = [
        crossed[frozenset(one.fields)] for one in found if one.choice != "memorise" and frozenset(one.fields) in crossed
    ]
    made.data.drop = [*made.data.drop, *left_out]
    if made.embedding.tables is not None:
        made.embedding.tables = {k: v for k, v in made.embedding.tables.items() if k not in left_out} or None
    made.model["factorise"] = [list(one.fields) for one in found if one.choice == "factorise"]
    return made


def _check(config: Config) -> None:
    target = class_of(config.model)
    if target is not OptInter:
        raise ConfigError(f"model.target is {config.model.get('target')}; expected model=optinter, which searches")
    if config.model.get("factorise") is not None:
        raise ConfigError("model.factorise is set, so nothing is searched; expected null")
    if config.embedding.kind != "dynamic":
        raise ConfigError(
            f"embedding.kind is {config.embedding.kind}; expected dynamic, whose tables give rare pairs no row"
        )
    if config.data.valid is None:
        raise ConfigError("data.valid is null; expected a split that says when the search is at its best")
    if config.selection.method != "none":
        raise ConfigError(f"selection.method is {config.selection.method}; expected none, fields are kept as they are")


def _chosen(config: Config, run: Path, gains: Mapping[Pair, float]) -> list[Interaction]:
    """Return the pairs of a search by the best model that it kept."""
    tower = build_tower(config, schema_of(config.data))
    assert isinstance(tower, OptInter)  # as `_check` has it
    storage = Storage(run / BEST)
    saved = load_tensors(
        SavedFolder(storage, files_listed(read_manifest(storage))), lambda name: name in ("tower/alpha", "tower/step")
    )
    with torch.no_grad():
        tower.alpha.copy_(saved["tower/alpha"])
    tower.step.copy_(saved["tower/step"])
    shares = tower.shares().detach()
    ways = shares.argmax(1).tolist()
    found = []
    for pair, way, (memorise, factorise, naive) in zip(tower.pairs, ways, shares.tolist(), strict=True):
        information = gains.get(pair, gains.get((pair[1], pair[0])))
        found.append(Interaction(pair, CHOICES[way], memorise, factorise, naive, information))
    return found


def _write(
    target: Path,
    process: Process,
    chosen: Config,
    settings: SearchSettings,
    found: Sequence[Interaction],
    runs: Mapping[str, Any],
) -> None:
    """Write what is known so far, on the first rank."""
    if not process.is_main:
        return
    overrides = write_choices(target, chosen)
    counts = {way: sum(one.choice == way for one in found) for way in CHOICES}
    told = {"version": VERSION, "metric": chosen.trainer.early_stop.metric, "settings": asdict(settings)}
    told |= {"counts": counts, "runs": dict(runs), "retrain": overrides, "pairs": [asdict(one) for one in found]}
    write_text(target / RESULT, json_text(told) + "\n")


def _value(feature: Any, key: str) -> Any:
    return feature[key] if isinstance(feature, Mapping) else getattr(feature, key)
