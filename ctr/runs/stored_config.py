"""The config.yaml of a run folder. It may come from somebody else: it is data, and nothing in it runs.

A class outside of `tessera.ctr.models` is imported only where whoever gives the command has named it there. What a
command line composes itself (`scripts/train.py`, `scripts/daily.py`, `--config-dir`) is the user's own and not looked
at here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tessera.ctr.instantiate import is_own
from tessera.ctr.renamed_keys import translate
from tessera.ctr.yaml_errors import NOT_YAML, first_line
from tessera.embedding.errors import ConfigError

BUILT = ("model", "numeric")  # the parts of a configuration that name classes


def read_config(path: Path, named: Collection[str] = ()) -> DictConfig:
    """Return the configuration in a file as it stands there, untyped; its keys have the names of this version.

    Args:
        named: classes outside of `tessera.ctr.models` that the user has named for this command.

    Raises ConfigError, one line: it is no YAML of a configuration, it has interpolations or other tags than YAML's own,
    or it names a class that it may not.
    """
    try:
        loaded = OmegaConf.load(path)
    except (*NOT_YAML, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {first_line(error)}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} is no configuration of a run; expected keys such as data and model")
    written = OmegaConf.to_container(loaded, resolve=False)
    for key, value in _leaves(written):
        if not isinstance(value, str | int | float | None):
            raise ConfigError(f"{path}: {key} is a {type(value).__name__}; expected text, a number, a list or keys")
        if isinstance(value, str) and "${" in value or "${" in key:
            raise ConfigError(f"{path}: {key} is {value!r}; a run's configuration is written with its values, not so")
        if key.split(".")[0] in BUILT and key.endswith(".target") and value not in named and not is_own(value):
            raise ConfigError(
                f"{path}: {key} is {value!r}, a class outside of tessera.ctr.models, which is not imported "
                f"because a file says so; if you trust it, name it on the command line: {key}={value} (SECURITY.md)"
            )
    assert isinstance(written, dict)
    translate(written)
    return OmegaConf.create(written)


def targets_of(overrides: list[str]) -> dict[str, str]:
    """Return key and value of the overrides that name classes: `model.target=my_models.Mine`."""
    pairs = [override.partition("=")[::2] for override in overrides]
    return {key: value for key, value in pairs if key.split(".")[0] in BUILT and key.endswith(".target")}


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no list and no dict, with its key; those of empty ones, too."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _leaves(value, f"{prefix}.{place}")
    else:
        yield prefix, node
