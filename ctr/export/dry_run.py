"""Before training begins: can the model leave? Its tower is exported untrained, and must answer as it does in training.

It takes half a second to three, two thirds of which torch.export traces; the rest is its archive, written and read. The
job's random numbers are left as they were.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tessera.ctr.config import Config
from tessera.ctr.data.config import schema_of
from tessera.ctr.export.tower import ServedTower, graph_of, largest_difference
from tessera.ctr.instantiate import is_own
from tessera.ctr.network import build_tower, fields_of
from tessera.ctr.serving.graph import load_graph
from tessera.ctr.serving.model_files import save_graph
from tessera.distributed.collectives import on_first_rank
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

EQUAL, EQUAL_AMP = 1e-4, 0.1  # logits of random rows (`difference_of`)


def check_export(config: Config, process: Process) -> None:
    """Export the untrained tower to a temporary folder and compare it with the tower, on the first rank.

    A model with gates is passed over: it ranks fields, and is no one's to export.

    Raises ConfigError, on all ranks: why it cannot be exported, or that the graph answers differently.
    """
    chosen = config.export.check
    if config.selection.method != "none":
        return
    if chosen == "never" or (chosen == "auto" and all(map(is_own, _targets([config.model, config.numeric])))):
        return
    on_first_rank(process, lambda: _check(config))


def _targets(node: Any) -> Iterator[Any]:
    """Yield the classes that a part of a configuration names, at any depth."""
    if isinstance(node, Mapping) and "target" in node:
        yield node["target"]
    if isinstance(node, Mapping | list):
        for one in node.values() if isinstance(node, Mapping) else node:
            yield from _targets(one)


def _check(config: Config) -> None:
    schema = schema_of(config.data)
    numeric, ids = len(schema.numeric_names), len(schema.pooled_names)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(config.trainer.seed)
        sequences = fields_of(config, schema).sequences
        # A model that cannot be built is no matter of the export: that error stands as it is.
        served = ServedTower(build_tower(config, schema), amp=config.trainer.amp, sequences=sequences)
        path = Path(folder) / "tower.pt2"
        try:
            save_graph(graph_of(served, numeric, ids), path)
            difference = largest_difference(served, load_graph(path), numeric, ids)
        except ConfigError as error:
            raise ConfigError(f"{error}; export.check=never trains it all the same") from None
    if not difference <= (EQUAL_AMP if config.trainer.amp else EQUAL):
        raise ConfigError(
            f"model.target {config.model['target']} answers otherwise when it is exported: logits differ by "
            f"{difference:.1e}; expected the same (its forward pass must not depend on the number of rows or on what "
            "torch.export cannot see); export.check=never trains it all the same"
        )
