"""Find the strings behind ids: the reader keeps 64-bit hashes, and people read names."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tessera.ctr.data import columns
from tessera.ctr.data.bags import as_lists, is_bag
from tessera.ctr.data.footers import RowGroups
from tessera.ctr.data.schema import Feature


def names_of_ids(groups: RowGroups, feature: Feature, ids: np.ndarray) -> dict[int, str]:
    """Return the strings of the data set that hash to these ids (int64) of a feature of dtype string.

    Reads the feature's column, row group by row group, until all are found; ids that no row holds are left out.
    """
    names: dict[int, str] = {}
    wanted = set(ids.tolist())
    for file, index in zip(groups.file, groups.index, strict=True):
        if not wanted - names.keys():
            break
        with groups.files[file].open() as parquet:
            column = parquet.read_row_group(int(index), columns=[feature.column], use_threads=False).column(0)
        for chunk in column.chunks:
            found = _distinct(feature, chunk)
            hashes, _, _ = columns.ids(found, "string")
            for at in np.flatnonzero(np.isin(hashes, ids)):
                names[int(hashes[at])] = found[int(at)].as_py()
    return names


def _distinct(feature: Feature, array: pa.Array) -> pa.Array:
    array = columns.plain(array)
    items = as_lists(feature, array).flatten() if is_bag(feature) else array
    if pa.types.is_dictionary(items.type):
        items = items.dictionary_decode()
    return pc.unique(items).drop_null()
