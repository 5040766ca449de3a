"""Values of features as columns beside the predictions, for the report's tables by value (`ctr/report/slices.py`)."""

from __future__ import annotations

import json
from collections.abc import Collection

import pyarrow as pa

from tessera.ctr.data.bags import is_bag
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.schema import Schema, nearest
from tessera.ctr.report.predictions import SLICE
from tessera.embedding.errors import ConfigError


class SliceColumn:
    """The column of one feature.

    An id feature gives its 64-bit ids (null where the row has none), a multi-valued one lists of them, a numeric one
    its float32 value after the schema's transform. `field` carries, as metadata, what the report needs to show a
    value as it was stored: `dtype` of the ids (int, uint64, hex, string), `boundaries` of a bucketised number, or
    `transform` of any other. unsigned: columns of the data whose integers are uint64.

    Raises:
        ConfigError: the schema has no such feature.
    """

    def __init__(self, schema: Schema, feature: str, unsigned: Collection[str] = ()):
        self.feature = feature
        categorical = {one.name: one for one in schema.categorical}
        if feature not in categorical and feature not in schema.scalar_names:
            known = nearest(feature, [*schema.id_names, *schema.scalar_names])
            raise ConfigError(f"slice {feature!r} is no feature of the schema; {known}")
        if feature in categorical:
            config = categorical[feature]
            dtype = "uint64" if config.dtype == "int" and config.column in unsigned else config.dtype
            self.kind = "bags" if is_bag(config) else "ids"
            shown = {"boundaries": json.dumps(config.boundaries)} if config.boundaries else {"dtype": dtype}
        else:
            transforms = {one.name: one.transform for one in schema.numeric}
            self.kind, shown = "numbers", {"transform": transforms.get(feature, "none")}
            self._column = schema.numeric_names.index(feature)
        of_kind = {"bags": pa.list_(pa.int64()), "ids": pa.int64(), "numbers": pa.float32()}
        self.field = pa.field(SLICE + feature, of_kind[self.kind], metadata=shown)

    def values(self, batch: Batch) -> pa.Array:
        """Return the slice values of the real rows of a batch, one each."""
        if self.kind == "numbers":
            return pa.array(batch.numeric[: batch.rows, self._column].cpu().numpy())
        ids = batch.ids[self.feature]
        # Bags of the padding are empty and stand last.
        values = pa.array(ids.values().cpu().numpy())
        offsets = ids.offsets()[: batch.rows + 1].cpu().numpy().astype("int32")
        bags = pa.ListArray.from_arrays(pa.array(offsets), values)
        return bags if self.kind == "bags" else _only(bags, values)


def _only(bags: pa.ListArray, values: pa.Array) -> pa.Array:
    """Return the one id of each row, null for a row without."""
    lengths = bags.value_lengths().to_numpy()
    if len(values) == len(lengths):
        return values
    starts = pa.array(bags.offsets.to_numpy()[:-1], mask=lengths == 0)
    return values.take(starts)
