"""Begin a run with what another one has learnt, although the model has changed since.

What has the same name and shape is taken over: modules, tables, and (by choice) optimizer state. The rest of the model
starts fresh, the rest of the saved state is dropped, and both are listed. Steps, reader and schedules begin anew, and
rows that were taken over are old ones (`optimizer.sparse.old_rows_factor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tessera.ctr.runs.log import RunLog
from tessera.ctr.train.check_state import as_written
from tessera.ctr.train.engine import Engine
from tessera.ctr.train.find_state import find_saved
from tessera.distributed.saved.dense import load_into, load_tensors, tensor_shapes
from tessera.distributed.saved.states import Saved
from tessera.distributed.saved.tables import describe_tables, load_pending, load_rows
from tessera.distributed.tables import as_dynamic, owned_tables
from tessera.embedding.errors import ConfigError


@dataclass
class Taken:
    """Names, in the new model but for `dropped`; optimizer: whose optimizer state was kept."""

    kept: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    optimizer: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return " · ".join(f"{what}: {', '.join(names) or 'none'}" for what, names in vars(self).items())


def warm_start(engine: Engine, log: RunLog) -> None:
    """Start from a saved state as `trainer.warm_start` of the configuration says. Each table and parameter is logged.

    Raises:
        CheckpointError: no state there that can be read.
        ConfigError: `rename` has a name that is not there.
    """
    config, process = engine.config.trainer.warm_start, engine.process
    assert config.path is not None  # or there is nothing to start from
    saved = find_saved(config.path, process, log.warn)
    process.stage = f"warm start from {saved.name}"
    old_names = _old_names(config.rename)
    with as_written(saved):
        tables = _take_tables(engine, saved, old_names, with_state=config.optimizer)
        tower = _take_tower(engine, saved, old_names, with_state=config.optimizer)
        shards = _take_shards(engine, saved, old_names, with_state=config.optimizer)
    log.say(f"warm start from {saved.name}, step {saved.step}")
    dense = "static tables" if as_dynamic(engine.tables) is None else "weights of tables"
    for what, taken in (("tables", tables), (dense, shards), ("parameters", tower)):
        if taken.kept or taken.fresh or taken.dropped:
            log.say(f"{what} · {taken}")
    known = {old for taken in (tables, tower, shards) for old in taken.dropped}
    unused = [f"{old}:{new}" for new, old in old_names.items() if _unused(old, known, tables, tower, shards, new)]
    if unused:
        raise ConfigError(
            f"trainer.warm_start.rename has {unused[0]!r}; no table or module is so called there and here"
        )


def _old_names(rename: list[str]) -> dict[str, str]:
    """New name -> old name."""
    pairs = [pair.split(":") for pair in rename]
    wrong = [pair for pair, parts in zip(rename, pairs, strict=True) if len(parts) != 2 or not all(parts)]
    if wrong:
        raise ConfigError(f"trainer.warm_start.rename has {wrong[0]!r}; expected old:new")
    return {new.strip(): old.strip() for old, new in pairs}


def _unused(old: str, dropped: set[str], tables: Taken, tower: Taken, shards: Taken, new: str) -> bool:
    kept = [*tables.kept, *tower.kept, *shards.kept]
    return old in dropped or not any(name == new or name.startswith((f"{new}.", f"{new}_")) for name in kept)


def _there(name: str, old_names: Mapping[str, str]) -> str:
    """The name under which the state has a table or a parameter: itself or a module around it may be renamed."""
    for new, old in old_names.items():
        if name == new or name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    return name


def _take_tables(engine: Engine, saved: Saved, old_names: Mapping[str, str], *, with_state: bool) -> Taken:
    described, owned = saved.training["tables"], owned_tables(engine.tables)
    taken, there_of = Taken(), {name: _there(name, old_names) for name in owned}
    for name, mine in describe_tables(owned).items():
        found = described.get(there_of[name])
        if found is None or found["groups"] != mine["groups"] or not _same_rows(found["columns"], mine["columns"]):
            taken.fresh.append(name)
            continue
        taken.kept.append(name)
        same_optimizer = found["optimizer"] == mine["optimizer"] and saved.manifest["kind"] != "model"
        if with_state and same_optimizer:
            taken.optimizer.append(name)
    taken.dropped = [name for name in described if name not in {there_of[n] for n in taken.kept}]
    kept = {name: owned[name] for name in taken.kept}
    load_rows(kept, saved, engine.process, there_of.__getitem__, taken.optimizer.__contains__, with_periods=False)
    load_pending(kept, saved, engine.process, there_of.__getitem__)
    return taken


def _same_rows(found: dict[str, Any], mine: dict[str, Any]) -> bool:
    found, mine = ({k: v for k, v in one.items() if k not in ("state", "period", "decay")} for one in (found, mine))
    return found == mine


def _take_tower(engine: Engine, saved: Saved, old_names: Mapping[str, str], *, with_state: bool) -> Taken:
    folder, tower = saved.folders[0], engine.network.tower
    shapes = {name.removeprefix("tower/"): s for name, s in tensor_shapes(folder).items() if name.startswith("tower/")}
    taken, own, sources = Taken(), tower.state_dict(), {}
    for name, value in own.items():
        there = _there(name, old_names)
        fits = there in shapes and shapes[there][0] == value.size()
        (taken.kept if fits else taken.fresh).append(name)
        if fits:
            sources[name] = there
    taken.dropped = [name for name in shapes if name not in sources.values()]
    found = load_tensors(folder, lambda name: name.removeprefix("tower/") in sources.values())
    tower.load_state_dict(own | {name: found[f"tower/{there}"] for name, there in sources.items()})
    before = saved.training.get("config", {}).get("optimizer", {}).get("dense", {}).get("name")
    if with_state and before == engine.config.optimizer.dense.name:
        state = load_tensors(folder, lambda name: name.startswith("optimizer/"))
        by_parameter: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            parameter, _, kind = key.removeprefix("optimizer/").rpartition("/")
            by_parameter.setdefault(parameter, {})[kind] = value
        taken.optimizer = [name for name, there in sources.items() if there in by_parameter]
        mine = {f"{n}/{kind}": value for n in taken.optimizer for kind, value in by_parameter[sources[n]].items()}
        engine.optimizers.take_over(mine)
    return taken


def _take_shards(engine: Engine, saved: Saved, old_names: Mapping[str, str], *, with_state: bool) -> Taken:
    """Static tables, and the dense weights of dynamic ones: tables/embedding_bags.<table>_<group>.weight,
    tables/projections.<table>_<group>.weight, tables/others."""
    shapes, taken, sources = tensor_shapes(saved.folders[0]), Taken(), {}

    def there_of(name: str) -> str:
        for new, old in old_names.items():
            name = name.replace(f".{new}_", f".{old}_").replace(f"/{new}_", f"/{old}_")
        return name

    for name, value in engine.tables.tensors().items():
        there = there_of(name)
        is_state = name.startswith("tables.optimizer/")
        fits = there in shapes and shapes[there][0] == value.size() and (with_state or not is_state)
        if fits:
            sources[there] = value
        label = _label(name)
        (taken.optimizer if is_state and fits else taken.kept if fits else [] if is_state else taken.fresh).append(
            label
        )
    dropped = [name for name in shapes if name.startswith("tables/") and name not in sources]
    taken.dropped = [_label(name) for name in dropped]
    if sources:
        load_into(saved.folders[0], sources)
    return taken


def _label(name: str) -> str:
    """tables/embedding_bags.C1_v.weight -> C1_v; tables/others -> others."""
    path = name.partition("/")[2]
    return path.partition(".")[2].rpartition(".")[0] or path
