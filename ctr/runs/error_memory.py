"""Error memories of models in training's own form: whose errors they are, and which models can have one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tessera.ctr.data.labels import Label
from tessera.ctr.metrics.tasks import is_single
from tessera.ctr.models.hidden import last_layer
from tessera.ctr.models.tower import Tower
from tessera.ctr.serving.error_memory import ErrorMemory
from tessera.embedding.errors import ConfigError


def width_of(tower: Tower, labels: Sequence[Label]) -> int:
    """Return the width of what an error memory knows rows by.

    Raises ConfigError: the model has no such layer, or answers anything but one probability.
    """
    if not is_single(labels):
        raise ConfigError(
            f"an error memory corrects one label of 0 and 1, and the schema has {', '.join(one.name for one in labels)}"
        )
    return last_layer(tower).in_features


def read_memory(folder: Path, base: str, tower: Tower, labels: Sequence[Label]) -> ErrorMemory:
    """Return the error memory in a folder.

    base: of the model. Raises ConfigError: it cannot have one, or the memory is of another model; ExportError: the
    memory cannot be read.
    """
    width = width_of(tower, labels)
    memory = ErrorMemory.load(folder)
    if (memory.base, memory.width) != (base, width):
        raise ConfigError(
            f"the error memory in {folder} is of model {memory.base}, and this one is {base}; expected that of the "
            "same model, whose errors they are"
        )
    return memory
