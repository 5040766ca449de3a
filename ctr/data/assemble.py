"""Windows to batches: the slices of a rank's lanes, one after the other, padded to the step's size."""

from __future__ import annotations

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctr.data.batch import Batch
from ctr.data.decode import is_bag
from ctr.data.schema import Schema
from ctr.data.window import Slice


def assemble(schema: Schema, slices: list[Slice], size: int, position: int) -> Batch:
    """slices: what the rank delivers in this step, at most `size` rows. Returns a batch of `size` rows."""
    rows = sum(part.stop - part.first for part in slices)
    assert rows <= size, (rows, size)
    numeric = np.empty((size, len(schema.numeric_names)), np.float32)
    labels = np.zeros((size, len(schema.labels)), np.float32)
    weight = np.ones(size, np.float32)
    group = np.zeros(size, np.int64) if schema.group else None
    time = np.zeros(size, np.int64) if schema.time else None
    if slices:
        # Side by side first and transposed as a whole: lane by lane the transposed pieces are small.
        numeric[:rows] = _beside([p.window.numeric[:, p.first : p.stop] for p in slices]).T
        if len(slices[0].window.labels):
            labels[:rows] = _beside([p.window.labels[:, p.first : p.stop] for p in slices]).T
        for name, out in (("weight", weight), ("group", group), ("time", time)):
            if out is not None and getattr(slices[0].window, name) is not None:
                np.concatenate([getattr(p.window, name)[p.first : p.stop] for p in slices], out=out[:rows])
    numeric[rows:] = 0
    weight[rows:] = 0
    return Batch(
        numeric=torch.from_numpy(numeric),
        ids=_keyed_jagged(schema, slices, rows, size),
        labels=torch.from_numpy(labels),
        weight=torch.from_numpy(weight),
        group=None if group is None else torch.from_numpy(group),
        time=None if time is None else torch.from_numpy(time),
        rows=rows,
        position=position,
    )


def _beside(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _keyed_jagged(schema: Schema, slices: list[Slice], rows: int, size: int) -> KeyedJaggedTensor:
    """Keys of one value per row lie in one matrix per window, so runs of them are copied at once."""
    features = schema.categorical
    singles = sum(not is_bag(feature) for feature in features)
    matrix, present = _single(slices, singles, rows)
    lengths = np.zeros((len(features), size), np.int32)
    parts: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    single = bag = 0
    i = 0
    while i < len(features):
        if is_bag(features[i]):
            values, item_weights = _bag(slices, bag, lengths[i], features[i].weights is not None)
            bag, i = bag + 1, i + 1
        else:
            run = i
            while run < len(features) and not is_bag(features[run]):
                run += 1
            chosen = slice(single, single + run - i)
            if present is None:
                values, lengths[i:run, :rows] = matrix[chosen].reshape(-1), 1
            else:
                values, lengths[i:run, :rows] = matrix[chosen][present[chosen]], present[chosen]
            item_weights = None
            single, i = single + run - i, run
        parts.append(values)
        if schema.weighted:
            weights.append(np.ones(len(values), np.float32) if item_weights is None else item_weights)
    return KeyedJaggedTensor(
        keys=schema.id_names,
        values=torch.from_numpy(_one(parts, np.int64)),
        weights=torch.from_numpy(_one(weights, np.float32)) if schema.weighted else None,
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=size,
    )


def _one(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _single(slices: list[Slice], singles: int, rows: int) -> tuple[np.ndarray, np.ndarray | None]:
    """int64 [singles, rows], and bool of the same shape where any is null."""
    matrix = np.empty((singles, rows), np.int64)
    if slices:
        np.concatenate([part.window.ids[:, part.first : part.stop] for part in slices], axis=1, out=matrix)
    if all(part.window.present is None for part in slices):
        return matrix, None
    present = np.ones((singles, rows), bool)
    start = 0
    for part in slices:
        stop = start + part.stop - part.first
        if part.window.present is not None:
            present[:, start:stop] = part.window.present[:, part.first : part.stop]
        start = stop
    return matrix, present


def _bag(slices: list[Slice], bag: int, lengths: np.ndarray, weighted: bool):
    """Values and weights of one multi-valued feature; its lengths are written to `lengths` [size]."""
    values, weights = [], []
    start = 0
    for part in slices:
        bags = part.window.bags[bag]
        offsets = bags.offsets[part.first : part.stop + 1]
        stop = start + len(offsets) - 1
        np.subtract(offsets[1:], offsets[:-1], out=lengths[start:stop], casting="same_kind")
        values.append(bags.values[offsets[0] : offsets[-1]])
        if weighted:
            weights.append(bags.weights[offsets[0] : offsets[-1]])
        start = stop
    return _one(values, np.int64), _one(weights, np.float32) if weighted else None
