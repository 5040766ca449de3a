"""Build what a configuration names: `target` is the path of a class, the other keys are its arguments."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from embedding.errors import ConfigError

OWN = re.compile(r"ctr\.models\.\w+\.\w+")


def is_own(target: Any) -> bool:
    """Return whether a target names a module of `ctr.models`, so that it can be built whoever has named it."""
    if not isinstance(target, str) or not OWN.fullmatch(target):
        return False
    module_name, _, class_name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("ctr.models.")


def instantiate(config: Mapping[str, Any], key: str, *positional: Any, **given: Any) -> Any:
    """The class that `config["target"]` names ("ctr.models.deepfm.DeepFM"), called with the other keys.

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
        raise ConfigError(f"{key}.target is missing; expected the path of a class, for example ctr.models.dnn.DNN")
    module_name, _, class_name = str(target).rpartition(".")
    try:
        made_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}.target is {target!r}, which cannot be imported: {error}") from None
    parameters = list(inspect.signature(made_class).parameters.values())[len(positional) :]
    known = [parameter.name for parameter in parameters]
    for name in config:
        if name not in known and name != "target":
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {key}.{near[0]}?" if near else f"; expected {', '.join(known) or 'none'}"
            raise ConfigError(f"{key}.{name} is not a key of {class_name}{hint}")
    for parameter in parameters:
        if parameter.name not in arguments and parameter.default is inspect.Parameter.empty:
            raise ConfigError(f"{key}.{parameter.name} is missing; {class_name} needs {', '.join(known)}")
    return made_class(*positional, **{name: value for name, value in arguments.items() if name in known})
