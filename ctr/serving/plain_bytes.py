"""How large columns become when they are decoded: the same value may stand in many rows of an Arrow column, which its
bytes do not tell."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from tessera.ctr.data.columns import present


def plain_bytes(array: pa.Array) -> int:
    """Return about how many bytes an array takes without dictionaries and views. Nothing is decoded for that."""
    return int(_of_each(array).sum())


def _of_each(array: pa.Array) -> np.ndarray:
    """Return the bytes of each value, int64 [n]."""
    kind, rows = array.type, len(array)
    if isinstance(array, pa.ExtensionArray):
        return _of_each(array.storage)
    if types.is_dictionary(kind):
        return _taken(_of_each(array.dictionary), array.indices)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32)  # each begins with its length
        return _there(array, views[4 * array.offset :: 4][:rows].astype(np.int64))
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return _there(array, _between(array, array.offsets.to_numpy(), array.sizes.to_numpy()))
    if types.is_list(kind) or types.is_large_list(kind):
        offsets = array.offsets.to_numpy()
        return _there(array, _between(array, offsets[:-1], np.diff(offsets)))
    if types.is_fixed_size_list(kind):
        begins = (array.offset + np.arange(rows)) * kind.list_size
        return _there(array, _between(array, begins, np.full(rows, kind.list_size)))
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.full(rows, array.nbytes // max(1, rows), np.int64)  # values that stand alone


def _there(array: pa.Array, sizes: np.ndarray) -> np.ndarray:
    there = present(array)
    return sizes if there is None else sizes * there


def _taken(sizes: np.ndarray, codes: pa.Array) -> np.ndarray:
    if not len(sizes):
        return np.zeros(len(codes), np.int64)
    return sizes.take(codes.fill_null(0).to_numpy(zero_copy_only=False), mode="clip")


def _between(array: pa.Array, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the bytes of the items from each begin on."""
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(_of_each(array.values))])
    last = len(ends) - 1
    return ends[(begins + lengths).clip(0, last)] - ends[begins.clip(0, last)]
