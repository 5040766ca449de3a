"""Build batches from windows: concatenate the slices of a rank's lanes and pad them to the size of the step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tessera.ctr.data.bags import is_bag
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.schema import Schema
from tessera.ctr.data.window import Slice, Window


class Assembler:
    """Builds the batches of one epoch."""

    def __init__(self, schema: Schema, *, numbered: bool = False):
        self.schema, self.numbered = schema, numbered
        self.singles = sum(not is_bag(feature) for feature in schema.categorical)
        self.parts = self._parts()
        self.full = torch.ones(self.singles, 0, dtype=torch.int32)

    def batch(self, slices: list[Slice], size: int, position: int) -> Batch:
        """Return a batch of `size` rows. slices: what the rank delivers in this step, at most `size` rows."""
        schema = self.schema
        rows = sum([stop - first for _, first, stop, _ in slices])
        assert rows <= size, (rows, size)
        numeric = np.empty((size, len(schema.numeric_names)), np.float32)
        labels = np.empty((size, len(schema.labels)), np.float32)
        weight = np.ones(size, np.float32)
        group = np.zeros(size, np.int64) if schema.group else None
        time = np.zeros(size, np.int64) if schema.time else None
        number = np.full(size, -1) if self.numbered else None
        place = np.zeros(size, np.int64)
        known = self._known(slices, rows, size)
        if slices:
            np.concatenate([one.places for one in slices], out=place[:rows])
            # Side by side first and transposed as a whole: lane by lane the transposed pieces are small.
            numeric[:rows] = np.concatenate([w.numeric[:, a:b] for w, a, b, _ in slices], axis=1).T
            if len(slices[0].window.labels):
                labels[:rows] = np.concatenate([w.labels[:, a:b] for w, a, b, _ in slices], axis=1).T
            else:
                labels[:rows] = 0
            if slices[0].window.weight is not None:
                _fill(weight[:rows], slices, lambda window: window.weight)
            if group is not None:
                _fill(group[:rows], slices, lambda window: window.group)
            if time is not None:
                _fill(time[:rows], slices, lambda window: window.time)
            if number is not None:
                _fill(number[:rows], slices, lambda window: window.number)
        numeric[rows:] = labels[rows:] = 0
        weight[rows:] = 0
        return Batch(
            numeric=torch.from_numpy(numeric),
            ids=self._keyed_jagged(slices, rows, size),
            labels=torch.from_numpy(labels),
            weight=torch.from_numpy(weight),
            group=None if group is None else torch.from_numpy(group),
            time=None if time is None else torch.from_numpy(time),
            rows=rows,
            position=position,
            number=None if number is None else torch.from_numpy(number),
            place=torch.from_numpy(place),
            known=None if known is None else torch.from_numpy(known),
            numbers=self._numbers(slices, size),
        )

    def _known(self, slices: list[Slice], rows: int, size: int) -> np.ndarray | None:
        """Return which labels are known, bool [size, T]; None if no label may be null. Those of padding are."""
        if all(task.nulls == "bad" for task in self.schema.tasks):
            return None
        known = np.ones((size, len(self.schema.tasks)), bool)
        start = 0
        for window, first, stop, _ in slices:
            if window.known is not None:
                known[start : start + stop - first] = window.known[:, first:stop].T
            start += stop - first
        assert start == rows
        return known

    def _numbers(self, slices: list[Slice], size: int) -> dict[str, torch.Tensor]:
        """Return the values of each sequence of numbers."""
        scratch = np.zeros(size, np.int32)
        first = sum(is_bag(feature) for feature in self.schema.categorical)
        found = {}
        for bag, feature in enumerate(self.schema.number_sequences, first):
            values, _ = _bag(slices, bag, scratch)
            found[feature.name] = torch.from_numpy(values.astype(np.float32, copy=False))
        return found

    def _parts(self) -> list[tuple[slice, slice | int]]:
        """Return slices of keys with the place of their values: rows of the matrix of single ids, which are copied at
        once, or the number of a multi-valued feature."""
        parts: list[tuple[slice, slice | int]] = []
        key = single = bag = 0
        for many, features in groupby(self.schema.categorical, is_bag):
            count = len(list(features))
            if many:
                parts += [(slice(key + i, key + i + 1), bag + i) for i in range(count)]
                bag += count
            else:
                parts.append((slice(key, key + count), slice(single, single + count)))
                single += count
            key += count
        return parts

    def _keyed_jagged(self, slices: list[Slice], rows: int, size: int) -> KeyedJaggedTensor:
        schema = self.schema
        matrix, present = self._single(slices, rows)
        if present is None and self.parts == [(slice(0, self.singles),) * 2]:  # one id everywhere
            lengths = self._ones(rows, size)
            values: list[np.ndarray] = [matrix.reshape(-1)]
            weights: list[np.ndarray] = []
        else:
            lengths = torch.zeros(len(schema.id_names), size, dtype=torch.int32)
            values, weights = self._mixed(slices, rows, matrix, present, lengths.numpy())
        return KeyedJaggedTensor(
            keys=schema.id_names,
            values=torch.from_numpy(_one(values, np.int64)),
            weights=torch.from_numpy(_one(weights, np.float32)) if schema.weighted else None,
            lengths=lengths.view(-1),
            stride=size,
        )

    def _mixed(
        self, slices: list[Slice], rows: int, matrix: np.ndarray, present: np.ndarray | None, lengths: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return values and weights of all keys in pieces; write their lengths to `lengths` int32 [keys, size]."""
        values, weights = [], []
        for keys, place in self.parts:
            item_weights = None
            if isinstance(place, int):
                items, item_weights = _bag(slices, place, lengths[keys.start])
            elif present is None:
                items, lengths[keys, :rows] = matrix[place].reshape(-1), 1
            else:
                items, lengths[keys, :rows] = matrix[place][present[place]], present[place]
            values.append(items)
            if self.schema.weighted:
                weights.append(np.ones(len(items), np.float32) if item_weights is None else item_weights)
        return values, weights

    def _ones(self, rows: int, size: int) -> torch.Tensor:
        """Return lengths of one id per row, 0 for padding. Nobody writes to lengths, so full batches share theirs."""
        if rows == size == self.full.shape[1]:
            return self.full
        lengths = torch.ones(self.singles, size, dtype=torch.int32)
        lengths[:, rows:] = 0
        if rows == size:
            self.full = lengths
        return lengths

    def _single(self, slices: list[Slice], rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the single ids int64 [singles, rows], and a bool mask of the same shape if any is null."""
        if not slices:
            return np.empty((self.singles, 0), np.int64), None
        matrix = np.concatenate([w.ids[:, a:b] for w, a, b, _ in slices], axis=1)
        if all([w.present is None for w, _, _, _ in slices]):
            return matrix, None
        present = np.ones((self.singles, rows), bool)
        start = 0
        for window, first, stop, _ in slices:
            if window.present is not None:
                present[:, start : start + stop - first] = window.present[:, first:stop]
            start += stop - first
        return matrix, present


def _fill(into: np.ndarray, slices: list[Slice], of: Callable[[Window], np.ndarray | None]) -> None:
    """Write a column of the slices' rows."""
    parts = []
    for window, first, stop, _ in slices:
        column = of(window)
        assert column is not None  # all windows of a data set have the same columns
        parts.append(column[first:stop])
    np.concatenate(parts, out=into)


def _one(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _bag(slices: list[Slice], bag: int, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return values and weights of one multi-valued feature; write its bag lengths to `lengths` [size]."""
    values, weights = [], []
    start = 0
    for window, first, stop, _ in slices:
        bags = window.bags[bag]
        offsets = bags.offsets[first : stop + 1]
        np.subtract(offsets[1:], offsets[:-1], out=lengths[start : start + stop - first], casting="same_kind")
        values.append(bags.values[offsets[0] : offsets[-1]])
        if bags.weights is not None:
            weights.append(bags.weights[offsets[0] : offsets[-1]])
        start += stop - first
    return _one(values, np.int64), _one(weights, np.float32) if weights else None
