"""Decode features that are vectors: lists of as many numbers in every row, such as embeddings of texts and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tessera.ctr.data import columns
from tessera.ctr.data.bags import as_lists, items_of, lengths_of, row_of
from tessera.ctr.data.columns import Arrays
from tessera.ctr.data.schema import LARGEST, Feature, length_of
from tessera.ctr.data.transforms import transform


@dataclass(frozen=True)
class Vectors:
    """A vector feature of n rows. values: float32 [n, length], what the model sees; there: bool [n], False where null,
    or None if nothing is; bad: bool [n] where a list has another length, or a number in it is null, not finite or too
    large, or None; found: row -> what stands there, for messages."""

    values: np.ndarray
    there: np.ndarray | None
    bad: np.ndarray | None
    found: Callable[[int], object]

    def absent(self) -> np.ndarray:
        """Return the indicator, float32 [n]: 1 where the vector was null."""
        return np.zeros(len(self.values), np.float32) if self.there is None else (~self.there).astype(np.float32)


def vectors(feature: Feature, arrays: Arrays) -> Vectors:
    """Decode one feature: the transform of each number, then `missing` for each number of a null vector."""
    lists, length = [as_lists(feature, array) for array in arrays], length_of(feature)
    lengths = np.concatenate([lengths_of(array) for array in lists])
    there = columns.joined([columns.present(array) for array in lists], [len(array) for array in lists])
    parts = [columns.floats(items_of(array)) for array in lists]
    known = columns.joined([part[1] for part in parts], [len(part[0]) for part in parts])
    stored = np.concatenate([part[0] for part in parts])
    with np.errstate(all="ignore"):  # what lies under nulls is arbitrary, and NaN is looked for below
        numbers = transform(feature, stored).astype(np.float32, copy=False)
    fine = np.abs(numbers) <= LARGEST
    fine = fine if known is None else fine & known
    whole = lengths == length
    bad = ~whole if there is None else ~whole & there
    if not fine.all():
        bad[row_of(lengths, ~fine)] = True
    if whole.all():
        values = numbers.reshape(len(lengths), length)
    else:
        values = np.full((len(lengths), length), feature.missing, np.float32)
        values[whole] = numbers[np.repeat(whole, lengths)].reshape(-1, length)
    return Vectors(values, there, bad if bad.any() else None, _finder(length, lengths, there, stored, fine))


def expected(feature: Feature) -> str:
    """Return what a vector has to be, for messages."""
    after = "" if feature.transform == "none" else f" after {feature.transform}"
    return f"{length_of(feature):,} finite numbers, at most {LARGEST:.0e} either way{after}"


def _finder(
    length: int, lengths: np.ndarray, there: np.ndarray | None, stored: np.ndarray, fine: np.ndarray
) -> Callable[[int], object]:
    def found(row: int) -> object:
        if there is not None and not there[row]:
            return "null"
        if lengths[row] != length:
            return f"{lengths[row]:,} numbers"
        first = int(lengths[:row].sum())
        at = int(np.argmin(fine[first : first + length]))
        return f"{stored[first + at]}, or null, as number {at}"

    return found
