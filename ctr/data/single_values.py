"""Decode one feature of single values: numbers and ids, as the reader of training and the scorer of exports both do.

Nothing here knows files or windows. A column comes as arrays one after the other, in their plain types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tessera.ctr.data import columns
from tessera.ctr.data.schema import LARGEST, Feature
from tessera.ctr.data.transforms import bucket, transform

Arrays = list[pa.Array]


@dataclass(frozen=True)
class Numbers:
    """A numeric feature. values: float32 [n], what the model sees; stored: [n], as found; there: bool [n], False where
    null, or None if nothing is; bad: bool [n] where a value is not finite or too large, or None if none is."""

    values: np.ndarray
    stored: np.ndarray
    there: np.ndarray | None
    bad: np.ndarray | None

    def absent(self) -> np.ndarray:
        """Return the indicator, float32 [n]: 1 where the value was null."""
        return np.zeros(len(self.values), np.float32) if self.there is None else (~self.there).astype(np.float32)


@dataclass(frozen=True)
class Singles:
    """A feature of at most one id per row. values: [n] integers, arbitrary where `there` (bool [n] or None: everywhere)
    is False; bad: bool [n] or None; found: row -> what stands there, for messages."""

    values: np.ndarray
    there: np.ndarray | None
    bad: np.ndarray | None
    found: Callable[[int], object]


def joined(parts: list[tuple]) -> tuple[np.ndarray, np.ndarray | None]:
    """Concatenate (values, mask, ...) parts; the mask is None if it has no False."""
    if len(parts) == 1:
        return parts[0][:2]
    masks = columns.joined([part[1] for part in parts], [len(part[0]) for part in parts])
    return np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.float32), masks


def numeric(feature: Feature, arrays: Arrays) -> Numbers:
    """Decode numbers: the feature's transform, then what stands for null."""
    stored, there = joined([columns.floats(array) for array in arrays])
    found = stored
    if feature.transform != "none" or feature.clip or found.dtype != np.float32:
        with np.errstate(all="ignore"):  # what lies under nulls is arbitrary, and NaN is looked for below
            found = transform(feature, stored).astype(np.float32)
    if there is not None:
        found = columns.filled(found, there, feature.missing)
    fine = np.abs(found) <= LARGEST
    return Numbers(found, stored, there, None if fine.all() else ~fine)


def expected_number(feature: Feature) -> str:
    """Return what a numeric feature's values have to be, for messages."""
    expected = f"a finite number, at most {LARGEST:.0e} either way"
    return expected if feature.transform == "none" else f"{expected} after {feature.transform}"


def single(feature: Feature, arrays: Arrays) -> Singles:
    """Decode one id per row, or the bucket of a number; a null takes the feature's `missing_id` where it has one."""
    decoded = _buckets(feature, arrays) if feature.kind == "numeric" else _ids(feature, arrays)
    if decoded.there is None or feature.missing_id is None:
        return decoded
    filled = columns.filled(decoded.values.astype(np.int64), decoded.there, feature.missing_id)
    return Singles(filled, None, decoded.bad, decoded.found)


def expected_id(feature: Feature) -> str:
    """Return what a feature's ids have to be, for messages."""
    if feature.kind == "numeric":
        return "a finite number"
    return "an integer of 64 bits" if feature.dtype == "int" else "1 to 16 hexadecimal digits"


def _ids(feature: Feature, arrays: Arrays) -> Singles:
    parts = [columns.ids(array, feature.dtype) for array in arrays]
    well_formed = columns.joined([part[2] for part in parts], [len(part[0]) for part in parts])
    found = lambda row: repr(pa.chunked_array(arrays)[row].as_py())  # noqa: E731
    return Singles(*joined(parts), None if well_formed is None else ~well_formed, found)


def _buckets(feature: Feature, arrays: Arrays) -> Singles:
    stored, there = joined([columns.floats(array) for array in arrays])
    finite = np.isfinite(stored) if there is None else np.isfinite(stored) | ~there
    found = lambda row: "null" if there is not None and not there[row] else stored[row]  # noqa: E731
    return Singles(bucket(feature, stored), there, None if finite.all() else ~finite, found)
