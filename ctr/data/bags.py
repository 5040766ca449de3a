"""Decode multi-valued features: lists and delimited strings become values and offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from tessera.ctr.data import columns
from tessera.ctr.data.schema import LARGEST, Feature, Schema, gives_ids
from tessera.ctr.data.transforms import bucket


@dataclass
class Bags:
    """One multi-valued feature of n rows: row i holds values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray  # int64 [v]; float32 of a sequence of numbers
    offsets: np.ndarray  # int64 [n + 1]
    weights: np.ndarray | None  # float32 [v]

    def take(self, rows: np.ndarray) -> Bags:
        """Return the bags of the given rows, in their order."""
        return gathered(self.values, self.weights, self.offsets[rows], np.diff(self.offsets)[rows])


@dataclass
class BagProblem:
    """Rows that break the contract: bool [n] rows, what was found in the first of them, what was expected."""

    rows: np.ndarray
    found: str
    expected: str
    column: str


def is_bag(feature: Feature) -> bool:
    """Return whether a row holds any number of the feature's ids."""
    return feature.kind in ("ids", "sequence")


def bags_of(schema: Schema) -> list[Feature]:
    """Return the features of which a window holds bags, in the order of `Window.bags`: those of ids, then numbers."""
    return [feature for feature in schema.categorical if is_bag(feature)] + schema.number_sequences


def no_bags(rows: int, feature: Feature) -> Bags:
    """Return empty bags."""
    return Bags(np.zeros(0, np.int64 if gives_ids(feature) else np.float32), np.zeros(rows + 1, np.int64), None)


def decode_bags(
    feature: Feature, arrays: list[pa.Array], weights: list[pa.Array] | None
) -> tuple[Bags, list[BagProblem]]:
    """Decode one feature. A row with a problem gets an empty bag."""
    lists = [as_lists(feature, array) for array in arrays]
    lengths = np.concatenate([lengths_of(array) for array in lists])
    decoded = [item_values(feature, items_of(array)) for array in lists]
    values = np.concatenate([part[0] for part in decoded]).astype(np.int64, copy=False)
    sizes = [len(part[0]) for part in decoded]
    keep = columns.joined([part[1] for part in decoded], sizes)
    well_formed = columns.joined([part[2] for part in decoded], sizes)
    problems = []
    bad_rows = np.zeros(len(lengths), bool)
    if well_formed is not None:
        item = int(np.flatnonzero(~well_formed)[0])
        bad_rows[row_of(lengths, ~well_formed)] = True
        found = repr(_item(lists, item))
        expected = "decimal integers" if feature.dtype == "int" else "1 to 16 hexadecimal digits"
        expected = "finite numbers" if feature.dtype == "float" else expected
        problems.append(BagProblem(bad_rows.copy(), found, expected, feature.column))
    item_weights = None
    if weights is not None:
        item_weights, uneven = _item_weights(feature, weights, lengths, problems)
        bad_rows |= uneven
    # An item is dropped if it is null, if its delimited token is empty, or with its row.
    dropped = np.repeat(bad_rows, lengths) if bad_rows.any() else None
    if keep is not None:
        dropped = ~keep if dropped is None else dropped | ~keep
    if dropped is not None:
        values = values[~dropped]
        item_weights = None if item_weights is None else item_weights[~dropped]
        lengths = lengths - np.bincount(rows_of_items(lengths)[dropped], minlength=len(lengths))
    there = columns.joined([columns.present(array) for array in lists], [len(array) for array in lists])
    if feature.missing_id is not None and there is not None:
        absent = ~there & ~bad_rows
        starts = np.cumsum(lengths) - lengths
        values = np.insert(values, starts[absent], feature.missing_id)
        item_weights = None if item_weights is None else np.insert(item_weights, starts[absent], 1.0)
        lengths = lengths + absent
    if feature.max_length is None or lengths.max(initial=0) <= feature.max_length:
        return Bags(values, offsets_of(lengths), item_weights), problems
    kept = np.minimum(lengths, feature.max_length)
    starts = np.cumsum(lengths) - (kept if feature.kind == "sequence" else lengths)
    return gathered(values, item_weights, starts, kept), problems


def item_values(feature: Feature, items: pa.Array) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return the ids of items [v], integers to be widened to int64; bool [v] present and well-formed, None if all are.
    Numbers of a bucketised sequence give their buckets."""
    if feature.dtype != "float":
        return columns.ids(items, feature.dtype)
    values, there = columns.floats(items)
    finite = np.isfinite(values) if there is None else np.isfinite(values) | ~there
    return bucket(feature, values), there, None if finite.all() else finite


def gathered(values: np.ndarray, weights: np.ndarray | None, starts: np.ndarray, lengths: np.ndarray) -> Bags:
    """Return bags of the `lengths` items from `starts` on, int64 [n] each."""
    offsets = offsets_of(lengths)
    items = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Bags(values[items], offsets, None if weights is None else weights[items])


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return where bags of these lengths begin and the last one ends, int64 [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def as_lists(feature: Feature, array: pa.Array) -> pa.Array:
    """Return the column as a list array; delimited strings are split, and empty tokens become null items."""
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_null(array.type):
        return pa.nulls(len(array), pa.list_(pa.int64()))
    if feature.delimiter is None:
        return array
    split = pc.split_pattern(array, feature.delimiter)
    items = split.values
    items = pc.if_else(pc.equal(pc.binary_length(items), 0), pa.scalar(None, items.type), items)
    rebuilt = pa.LargeListArray if types.is_large_list(split.type) else pa.ListArray
    mask = split.is_null() if split.null_count else None
    return rebuilt.from_arrays(split.offsets, items, mask=mask)


def lengths_of(array: pa.Array) -> np.ndarray:
    """Return the length of each list, int64 [n]; 0 for null."""
    return pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def items_of(array: pa.Array) -> pa.Array:
    """Return the items of all lists, one after the other."""
    # flatten and not values: it leaves out what lies under null lists and outside of a slice.
    return array.flatten()


def _item(lists: list[pa.Array], item: int) -> Any:
    for array in lists:
        items = items_of(array)
        if item < len(items):
            return items[item].as_py()
        item -= len(items)
    raise AssertionError("item is past the end")


def _item_weights(
    feature: Feature, weights: list[pa.Array], lengths: np.ndarray, problems: list[BagProblem]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the float32 weight of every item, and bool [n] that marks rows with bad weights (they get weight 0)."""
    column = feature.weights
    assert column is not None  # `weights` is of it
    arrays = [pa.nulls(len(w), pa.list_(pa.float32())) if types.is_null(w.type) else w for w in weights]
    found = np.concatenate([lengths_of(array) for array in arrays])
    parts, finite = [], []
    for array in arrays:
        items = items_of(array)
        values, there = columns.floats(items)
        values = values.astype(np.float32)
        parts.append(values)
        fine = np.abs(values) <= LARGEST
        finite.append(fine if there is None else fine & there)
    parts, finite = np.concatenate(parts), np.concatenate(finite)
    uneven = found != lengths
    if uneven.any():
        row = int(np.flatnonzero(uneven)[0])
        expected = f"{lengths[row]} as in column {feature.column!r}"
        problems.append(BagProblem(uneven, f"{found[row]} weights", expected, column))
    bad = uneven.copy()
    if not finite.all():
        rows = np.zeros(len(lengths), bool)
        rows[row_of(found, ~finite)] = True
        value = parts[np.flatnonzero(~finite)[0]]
        problems.append(
            BagProblem(rows, f"{value} or null", f"finite weights, at most {LARGEST:.0e} either way", column)
        )
        bad |= rows
    out = np.zeros(int(lengths.sum()), np.float32)
    out[np.repeat(~uneven, lengths)] = parts[np.repeat(~uneven, found)]
    return out, bad


def rows_of_items(lengths: np.ndarray) -> np.ndarray:
    """Return the row of each item, int64 [v]."""
    return np.repeat(np.arange(len(lengths)), lengths)


def row_of(lengths: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return the rows of chosen items, of bags of these lengths. items: bool or places of items."""
    return rows_of_items(lengths)[items]
