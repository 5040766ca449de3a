"""Names that keys and values had in earlier versions: a user's are refused with the new name, those in the files of an
earlier run are translated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tessera.embedding.errors import ConfigError

#: Earlier name -> name now. What stood below an earlier name stands below the new one.
KEYS = {
    "embedding.others": "embedding.oov",
    "embedding.first_values": "embedding.init",
    "embedding.bag_path": "embedding.pooled_output_dist",
    "embedding.step": "embedding.scale",
    "daily.guard": "daily.bands",
    "trainer.checkpoint.keep": "trainer.checkpoint.keep_last",
}
#: Name of a key now -> its earlier values -> those now.
VALUES = {"embedding.init": {"others": "oov"}}


def refuse_renamed(key: str, value: Any = None) -> None:
    """Raise ConfigError with the new name if a key, or what it lies below, or its value has an earlier name."""
    old = next((old for old in KEYS if key == old or key.startswith(f"{old}.")), None)
    now = key if old is None else KEYS[old] + key.removeprefix(old)
    renamed = VALUES.get(now, {}).get(value) if isinstance(value, str) else None
    if renamed is not None:
        raise ConfigError(f"{key}={value} is now {now}={renamed}")
    if old is not None:
        raise ConfigError(f"{key} is now {now}")


def refuse_all_renamed(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first key or value of a nested mapping that has an earlier name."""
    for key in (*KEYS, *VALUES):
        group, _, name = key.rpartition(".")
        held = _below(config, group)
        if held is not None and name in held:
            refuse_renamed(key, held[name])


def translate(config: dict[Any, Any]) -> None:
    """Give the keys and values of a nested mapping, as an earlier version wrote it, their names of now, in place."""
    for old, now in KEYS.items():
        group, _, name = old.rpartition(".")
        held = _below(config, group)
        if held is not None and name in held:
            held[now.rpartition(".")[2]] = held.pop(name)
    for key, values in VALUES.items():
        group, _, name = key.rpartition(".")
        held = _below(config, group)
        if held is not None and isinstance(held.get(name), str):
            held[name] = values.get(held[name], held[name])


def _below(config: Any, group: str) -> Any:
    """Return the mapping of a dotted group; None where there is none."""
    for name in group.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None
