"""Decode aligned sequences: columns whose lists hold the same events, such as items, categories and times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from tessera.ctr.data import columns
from tessera.ctr.data.bags import BagProblem, Bags, as_lists, gathered, item_values, items_of, lengths_of, row_of
from tessera.ctr.data.schema import LARGEST, Feature, gives_ids
from tessera.ctr.data.transforms import transform


class Chunk(Protocol):
    """Where decoded rows go: `decode._Chunk`."""

    def mark(
        self, bad: np.ndarray, reason: str, column: str, expected: str, found: Callable[[int], object]
    ) -> None: ...

    def deliver_bags(self, i: int, bags: Bags) -> None: ...


@dataclass(frozen=True)
class AlignedStep:
    """Decodes a group. names: of its columns, each once; at: the places of its features among the windows' bags."""

    group: list[Feature]
    names: tuple[str, ...]
    at: list[int]

    def __call__(self, chunk: Chunk, *arrays: list[pa.Array]) -> None:
        of = dict(zip(self.names, arrays, strict=True))
        if not arrays[0]:
            return
        decoded, problems = decode_aligned(self.group, [of[feature.column] for feature in self.group])
        for problem in problems:
            chunk.mark(problem.rows, "sequence", problem.column, problem.expected, _found(problem))
        for i, bags in zip(self.at, decoded, strict=True):
            chunk.deliver_bags(i, bags)


@dataclass
class _Items:
    """One sequence of n rows: values [v] of all events, and bool [v] which are there and which are well-formed (None:
    all)."""

    values: np.ndarray
    there: np.ndarray | None
    well_formed: np.ndarray | None

    def kept(self, keep: np.ndarray) -> None:
        self.values = self.values[keep]
        self.there = None if self.there is None else self.there[keep]
        self.well_formed = None if self.well_formed is None else self.well_formed[keep]


def decode_aligned(
    features: Sequence[Feature], arrays: Sequence[list[pa.Array]]
) -> tuple[list[Bags], list[BagProblem]]:
    """Decode one group, the arrays of each feature's column. A row with a problem has no events.

    All sequences of a row must have as many events. An event that lacks one of its ids (null, without missing_id) is
    taken out of all of them; then all are cut to the newest max_length events. Numbers come back as float32.
    """
    lists = [[as_lists(feature, array) for array in one] for feature, one in zip(features, arrays, strict=True)]
    lengths_of_all = [np.concatenate([lengths_of(array) for array in one]) for one in lists]
    lengths, problems = lengths_of_all[0], list[BagProblem]()
    bad_rows = np.zeros(len(lengths), bool)
    for feature, found in zip(features[1:], lengths_of_all[1:], strict=True):
        uneven = found != lengths
        if uneven.any():
            row = int(np.flatnonzero(uneven)[0])
            expected = f"{lengths[row]} as in column {features[0].column!r}, with which it is aligned"
            problems.append(BagProblem(uneven, f"{found[row]} events", expected, feature.column))
            bad_rows |= uneven
    items = [_items(feature, one, problems) for feature, one in zip(features, lists, strict=True)]
    if bad_rows.any():
        for one, found in zip(items, lengths_of_all, strict=True):
            one.kept(~np.repeat(bad_rows, found))
        lengths = np.where(bad_rows, 0, lengths)
    keep = np.ones(int(lengths.sum()), bool)
    for one in items:
        if one.well_formed is not None:
            bad_rows[row_of(lengths, ~one.well_formed)] = True
        if one.there is not None:
            keep &= one.there
    keep &= ~np.repeat(bad_rows, lengths)
    if not keep.all():
        for one in items:
            one.kept(keep)
        lengths = np.bincount(row_of(lengths, keep), minlength=len(lengths))
    longest = features[0].max_length
    kept = lengths if longest is None else np.minimum(lengths, longest)
    starts = np.cumsum(lengths) - kept
    return [gathered(one.values, None, starts, kept) for one in items], problems


def _items(feature: Feature, lists: list[pa.Array], problems: list[BagProblem]) -> _Items:
    parts = [(item_values if gives_ids(feature) else _numbers)(feature, items_of(array)) for array in lists]
    values = np.concatenate([part[0] for part in parts])
    values = values.astype(np.int64 if gives_ids(feature) else np.float32, copy=False)
    sizes = [len(part[0]) for part in parts]
    there, well_formed = (columns.joined([part[i] for part in parts], sizes) for i in (1, 2))
    if well_formed is not None:
        row = row_of(np.concatenate([lengths_of(array) for array in lists]), ~well_formed)
        rows = np.zeros(sum(len(array) for array in lists), bool)
        rows[row] = True
        item = int(np.flatnonzero(~well_formed)[0])
        found = next(iter(pa.chunked_array([items_of(array) for array in lists]).slice(item, 1))).as_py()
        problems.append(BagProblem(rows, repr(found), _expected(feature), feature.column))
    if there is not None and feature.missing_id is not None and gives_ids(feature):
        values, there = columns.filled(values, there, feature.missing_id), None
    return _Items(values, there, well_formed)


def _numbers(feature: Feature, items: pa.Array) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return float32 values after the transform; null is `missing`, and no event is taken out for it."""
    stored, there = columns.floats(items)
    with np.errstate(all="ignore"):  # what lies under nulls is arbitrary
        values = transform(feature, stored).astype(np.float32)
    if there is not None:
        values = columns.filled(values, there, feature.missing)
    fine = np.abs(values) <= LARGEST
    return values, None, None if fine.all() else fine


def _expected(feature: Feature) -> str:
    if feature.dtype == "float":
        after = f" after {feature.transform}" if feature.transform not in ("none", "bucketise") else ""
        return f"finite numbers, at most {LARGEST:.0e} either way{after}"
    return "decimal integers" if feature.dtype == "int" else "1 to 16 hexadecimal digits"


def _found(problem: BagProblem) -> Callable[[int], object]:
    return lambda _row: problem.found
