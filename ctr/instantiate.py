"""Build the object that a configuration names: `target` is the path of a class, the other keys are its arguments."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from tessera.embedding.errors import ConfigError, did_you_mean

OWN = re.compile(r"tessera\.ctr\.models\.\w+\.\w+")
BEFORE = "ctr.models."  # so runs and yaml of version 0.1 name what is below tessera.ctr.models


def is_own(target: Any) -> bool:
    """Return whether a target names a module of `tessera.ctr.models`, so that it can be built whoever has named it."""
    if not isinstance(target, str) or not OWN.fullmatch(current_name(target)):
        return False
    module_name, _, class_name = current_name(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(f"tessera.{BEFORE}")


def class_of(config: Mapping[str, Any]) -> type | None:
    """Return the class that `config["target"]` names; None where there is none, which `instantiate` tells."""
    module_name, _, class_name = current_name(str(config.get("target"))).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) else None


def current_name(target: str) -> str:
    """Return the present path of a class: version 0.1 had no `tessera.` in front."""
    return f"tessera.{target}" if target.startswith(BEFORE) else target


def instantiate(config: Mapping[str, Any], key: str, *positional: Any, **given: Any) -> Any:
    """Call the class that `config["target"]` names ("tessera.ctr.models.deepfm.DeepFM") with the other keys.

    Args:
        key: where in the configuration this stands ("model"), for messages.
        positional: the constructor's first arguments, which the configuration does not set.
        given: arguments that the caller fixes; a key of the same name is ignored.

    Raises:
        ConfigError: no such class, or a key that its constructor does not take, or one that it misses.
    """
    arguments = {**config, **given}
    target = arguments.pop("target", None)
    if target is None:
        raise ConfigError(
            f"{key}.target is missing; expected the path of a class, for example tessera.ctr.models.dnn.DNN"
        )
    module_name, _, class_name = current_name(str(target)).rpartition(".")
    try:
        made_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}.target is {target!r}, which cannot be imported: {error}{_moved(error)}") from None
    parameters = list(inspect.signature(made_class).parameters.values())[len(positional) :]
    known = [parameter.name for parameter in parameters]
    for name in config:
        if name not in known and name != "target":
            hint = did_you_mean(name, known, f"expected {', '.join(known) or 'none'}", form=f"{key}.{{}}")
            raise ConfigError(f"{key}.{name} is not a key of {class_name}{hint}")
    for parameter in parameters:
        if parameter.name not in arguments and parameter.default is inspect.Parameter.empty:
            raise ConfigError(f"{key}.{parameter.name} is missing; {class_name} needs {', '.join(known)}")
    return made_class(*positional, **{name: value for name, value in arguments.items() if name in known})


def _moved(error: Exception) -> str:
    """Return the end of an import error's message if a model of the user's imports by the names of version 0.1; else
    empty."""
    name = (error.name or "") if isinstance(error, ImportError) else ""
    moved = name.split(".")[0] in ("ctr", "embedding", "distributed")
    return f"; since version 0.2 this project is imported as tessera.{name}" if moved else ""
