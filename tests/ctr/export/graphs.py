"""The graph of an archive beside its tower and beside what torch's own loader makes of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tessera.ctr.export.tower import ServedTower, graph_of, inputs_of, largest_difference
from tessera.ctr.serving.graph import Graph, TorchGraph, load_graph
from tessera.ctr.serving.model_files import save_graph


def by_torch(path: Path) -> TorchGraph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TorchGraph(torch.export.load(path).module())


@torch.no_grad()
def check_graph(one: ServedTower, path: Path, numeric: int, ids: int) -> None:
    """Save the graph of a tower and open it: it answers as the tower does and, bit for bit, as by torch's loader."""
    save_graph(graph_of(one, numeric, ids), path)
    found, theirs = load_graph(path), by_torch(path)
    assert isinstance(found, Graph), "something in it is unknown"
    assert largest_difference(one, found, numeric, ids) <= 1e-5
    for rows in (1, 2, 37):
        inputs = inputs_of(one.tower.embedding_dims, numeric, ids, rows, rows, one.sequences)
        assert torch.equal(found(*inputs), theirs(*inputs))
