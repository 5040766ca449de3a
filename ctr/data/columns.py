"""Convert one Arrow array to numpy: numbers to float32, ids of any stored form to 64 bits, times to seconds.

Nothing here knows features or files. Values under nulls are arbitrary; the mask that comes back tells them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from tessera.ctr.data import arrow_types
from tessera.ctr.data.footers import is_text
from tessera.ctr.data.times import TICKS_PER_SECOND

Arrays = list[pa.Array]
NULL_GROUP = -(2**63)  # the group of rows whose group column is null
# Nearly all columns are of these; a set is quicker than a chain of questions asked a thousand times a second.
PLAIN = {pa.int64(), pa.int32(), pa.float32(), pa.float64()}


def plain(array: pa.Array) -> pa.Array:
    """Return the array in the plain type that holds the same values (`arrow_types.py`)."""
    return array if array.type in PLAIN else arrow_types.plain(array)


def present(array: pa.Array) -> np.ndarray | None:
    """Return bool [n], False where null; None if nothing is null."""
    if array.null_count == 0:
        return None
    bits = array.buffers()[0]
    if bits is None:  # the type null
        return np.zeros(len(array), bool)
    first = array.offset // 8
    packed = np.frombuffer(bits, np.uint8)[first : (array.offset + len(array) + 7) // 8]
    skip = array.offset - 8 * first
    return np.unpackbits(packed, bitorder="little")[skip : skip + len(array)].view(bool)


def joined(masks: list[np.ndarray | None], sizes: list[int]) -> np.ndarray | None:
    """Concatenate several masks, where None stands for all True; return None if all are None."""
    if all(mask is None for mask in masks):
        return None
    pairs = zip(masks, sizes, strict=True)
    return np.concatenate([np.ones(size, bool) if mask is None else mask for mask, size in pairs])


def fixed_width(array: pa.Array) -> np.ndarray:
    """Return the values of an array of integers or floats without a copy; they are arbitrary where null."""
    if not array.null_count:
        return array.to_numpy()
    plain = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    return plain.to_numpy(zero_copy_only=True)


def filled(values: np.ndarray, there: np.ndarray, missing: float) -> np.ndarray:
    """Return values [n] of 4 or 8 bytes, with `missing` where `there` is False.

    By bits, because where() and masked copies branch on each element: with a fifth of them missing at random they
    take ten times as long.
    """
    whole = np.int32 if values.itemsize == 4 else np.int64
    mask = np.subtract(0, there.view(np.int8), dtype=whole)  # all bits where there
    bits = values.view(whole) & mask
    if missing != 0:
        bits |= values.dtype.type(missing).view(whole) & ~mask
    return bits.view(values.dtype)


def floats(array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a column of numbers, [n] of their own type (to be cast to float32), and bool [n] present, None if all
    are."""
    array = _dense(array, pa.float32())
    if types.is_decimal(array.type):
        array = array.cast(pa.float64())
    return fixed_width(array), present(array)


def seconds(array: pa.Array, unit: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return times (dates, timestamps, or integers in `unit`) as int64 [n] seconds since 1970; and bool [n] present,
    None if all are."""
    array = _dense(array, pa.int64())
    if types.is_date32(array.type):
        values = fixed_width(array.view(pa.int32())).astype(np.int64) * 86400
    elif types.is_date64(array.type):
        values = fixed_width(array.view(pa.int64())) // 1000
    elif types.is_timestamp(array.type):
        values = fixed_width(array.view(pa.int64())) // TICKS_PER_SECOND[array.type.unit]
    else:
        values = fixed_width(array)
        if values.dtype == np.uint64:
            values = np.minimum(values, np.uint64(2**63 - 1))  # as implausible, and not negative
        values = values.astype(np.int64) // TICKS_PER_SECOND[unit]
    return values, present(array)


def ids(array: pa.Array, dtype: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Convert ids that are stored as the feature's `dtype` says: int, hex or string.

    Returns [n] values, integers to be widened to int64; bool [n] present, None when all are; bool [n]
    well-formed, None when all are. Nulls count as well-formed.
    """
    if array.type in PLAIN:
        return fixed_width(array), present(array), None
    if types.is_dictionary(array.type):
        return _dictionary_ids(array, dtype)
    if types.is_null(array.type):
        return np.zeros(len(array), np.int64), np.zeros(len(array), bool), None
    there = present(array)
    if types.is_decimal(array.type):
        array = array.cast(pa.string())
        dtype = "int"
    elif not is_text(array.type):
        return whole(array), there, None
    if dtype == "int":  # items of a delimited string, or decimals
        values, well_formed = parse_integers(array)
    else:
        values, well_formed = hashed(array, dtype)
    if well_formed is not None and there is not None:
        well_formed = well_formed | ~there
    # No digits at all are a missing id, as null is.
    if dtype == "hex" and well_formed is not None and not well_formed.all():
        filled = pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False) > 0
        there, well_formed = (filled if there is None else there & filled), well_formed | ~filled
    return values, there, None if well_formed is None or well_formed.all() else well_formed


def whole(array: pa.Array) -> np.ndarray:
    """Return [n] of an integer type, to be widened to int64; unsigned 64-bit numbers keep their bits."""
    values = fixed_width(_dense(array, pa.int64()))
    return values.view(np.int64) if values.dtype == np.uint64 else values


def hashed(array: pa.Array, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert strings to 64 bits, by XXH64 or as hex digits: int64 [n], and for hex bool [n] well-formed."""
    # Imported late: the hash is a torch op, and processes that never decode strings need no torch here.
    import torch

    from tessera.kernels.string_hash import hex_to_int64, xxh64

    _, offsets, data = array.buffers()
    wide = types.is_large_string(array.type) or types.is_large_binary(array.type)
    stored = np.frombuffer(offsets, np.int64 if wide else np.int32)
    bounds = torch.from_numpy(stored[array.offset : array.offset + len(array) + 1].astype(np.int64))
    size = 0 if data is None else data.size
    # DLPack shares the bytes; torch.from_numpy would warn that Arrow's memory is read-only.
    text = torch.from_dlpack(pa.Array.from_buffers(pa.uint8(), size, [None, data or pa.py_buffer(b"")]))
    if dtype == "string":
        return xxh64(text, bounds).numpy(), None
    values, well_formed = hex_to_int64(text, bounds)
    return values.numpy(), well_formed.numpy()


def parse_integers(array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Parse decimal digits to the bits of signed or unsigned integers: int64 [n]; bool [n] well-formed or None."""
    try:
        return fixed_width(array.cast(pa.int64())), None
    except pa.ArrowInvalid:
        pass
    if not (types.is_string(array.type) or types.is_large_string(array.type)):
        array = array.cast(pa.binary()).cast(pa.string(), safe=False)
    # Digits without leading zeros, so that numbers of equal length compare as their strings do.
    digits = pc.replace_substring_regex(array, r"^(-?)0+([0-9])", r"\1\2")
    negative = pc.match_substring_regex(digits, r"^-[0-9]{1,19}$")
    fits_negative = pc.or_(pc.less(pc.binary_length(digits), 20), pc.less_equal(digits, str(-(2**63))))
    positive = pc.match_substring_regex(digits, r"^[0-9]{1,20}$")
    fits_positive = pc.or_(pc.less(pc.binary_length(digits), 20), pc.less_equal(digits, str(2**64 - 1)))
    negative, positive = pc.and_(negative, fits_negative), pc.and_(positive, fits_positive)
    below = fixed_width(pc.if_else(negative, digits, "0").fill_null("0").cast(pa.int64()))
    above = fixed_width(pc.if_else(positive, digits, "0").fill_null("0").cast(pa.uint64()))
    well_formed = pc.or_(negative, positive).fill_null(fill_value=True).to_numpy(zero_copy_only=False)
    return below | above.view(np.int64), well_formed


def _dictionary_ids(array: pa.DictionaryArray, dtype: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    codes = fixed_width(array.indices)
    there = present(array.indices)
    if len(array.dictionary) == 0:
        return np.zeros(len(array), np.int64), there, None
    entries, entry_there, entry_well_formed = ids(array.dictionary, dtype)
    # Codes under nulls are arbitrary, hence clip; it is also the faster mode.
    values = np.take(entries, codes, mode="clip")
    if entry_there is not None:
        entry_there = np.take(entry_there, codes, mode="clip")
        there = entry_there if there is None else there & entry_there
    well_formed = None
    if entry_well_formed is not None:
        well_formed = np.take(entry_well_formed, codes, mode="clip")
        well_formed = well_formed if there is None else well_formed | ~there
    return values, there, well_formed


def _dense(array: pa.Array, when_null: pa.DataType) -> pa.Array:
    """Return the array without dictionary, bit-packed booleans or the type null, which have no buffer of values to
    read."""
    if array.type in PLAIN:
        return array
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_null(array.type):
        return pa.nulls(len(array), when_null)
    return array.cast(pa.uint8()) if types.is_boolean(array.type) else array


def finder(values: np.ndarray, there: np.ndarray | None = None) -> Callable[[int], object]:
    """Return what says of a row what stands there, for messages. there: bool, of all rows; None: all are there."""
    return lambda row: "null" if there is not None and not there[row] else values[row]
