"""Convert the many Arrow types that store one thing to the few plain types that the reader decodes.

Writers choose: polars and DataFusion write views of strings and of lists, databases decimals, others fixed-size bytes
or extension types. None of them says anything else than the plain type does.
"""

from __future__ import annotations

import pyarrow as pa
from pyarrow import types


def plain_type(stored: pa.DataType) -> pa.DataType:
    """Return the plain type that the reader decodes and that holds the same values."""
    if isinstance(stored, pa.BaseExtensionType):  # uuid, json, bool8, ...
        return plain_type(stored.storage_type)
    if types.is_string_view(stored):
        return pa.string()
    if types.is_binary_view(stored) or types.is_fixed_size_binary(stored):
        return pa.binary()
    if types.is_dictionary(stored):
        return pa.dictionary(stored.index_type, plain_type(stored.value_type), stored.ordered)
    if types.is_list(stored) or types.is_list_view(stored):
        return pa.list_(_plain_item(stored))
    if types.is_large_list(stored) or types.is_large_list_view(stored):
        return pa.large_list(_plain_item(stored))
    if types.is_fixed_size_list(stored):
        return pa.list_(_plain_item(stored), stored.list_size)
    return stored


def _plain_item(stored: pa.DataType) -> pa.Field:
    return stored.value_field.with_type(plain_type(stored.value_type))


def plain(array: pa.Array) -> pa.Array:
    """Return the array in its plain type; the same array if it is plain already."""
    wanted = plain_type(array.type)
    if wanted == array.type:
        return array
    if isinstance(array, pa.ExtensionArray):
        return plain(array.storage)
    if types.is_dictionary(wanted):
        return pa.DictionaryArray.from_arrays(array.indices, plain(array.dictionary))
    return array.cast(wanted)


def advice(found: pa.DataType) -> str:
    """Return the end of an error message that says how to write a column of an unreadable type; empty if there is no
    advice."""
    if types.is_duration(found) or types.is_time(found):
        return "; write the number of seconds: cast it to an integer or a float"
    if types.is_timestamp(found) or types.is_date(found):
        return "; write what of it is meant as a column of its own: its hour, its weekday, the seconds since 1970"
    if types.is_struct(found):
        return "; write its fields as columns of their own"
    if types.is_map(found):
        return "; write its keys as a list column, and its values as another one"
    if types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found):
        return "; lists are read by features of kind ids, sequence and vector"
    if types.is_string(found) or types.is_large_string(found) or types.is_binary(found):
        return "; text is read by features of kind id with dtype string or hex, or cast it to a number"
    return ""
