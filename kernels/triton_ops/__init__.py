"""Every op of this package as Triton kernels, on the GPU or under Triton's interpreter (`launch.py`).

The functions take what the ops of `torch.ops.tessera` take (`kernels/schemas.py`). What no
training step calls on a GPU is the definition in torch: the reader's string ops, `coldest`, and
`copy_rows`, `take_places`, `records_read` and `records_write`, of saved states and eviction; so is `latest_of_bags`,
which is few operations.
"""

from tessera.kernels.reference.copy_rows import copy_rows
from tessera.kernels.reference.latest import latest_of_bags
from tessera.kernels.reference.records import records_read, records_write
from tessera.kernels.reference.string_hash import hex_to_int64, xxh64
from tessera.kernels.reference.take_places import take_places
from tessera.kernels.reference.touch import coldest
from tessera.kernels.triton_ops.cold_queue import (
    cold_add,
    cold_list,
    cold_look,
    cold_order,
    cold_scan,
    cold_take,
    cold_tell,
)
from tessera.kernels.triton_ops.faults import check
from tessera.kernels.triton_ops.gather import gather
from tessera.kernels.triton_ops.id_map import id_map_find, id_map_insert, id_map_place
from tessera.kernels.triton_ops.id_map_erase import erase_places, id_map_erase
from tessera.kernels.triton_ops.initialise import init_rows
from tessera.kernels.triton_ops.learned import packed_learn_scales
from tessera.kernels.triton_ops.message import pack_ids, read_ids
from tessera.kernels.triton_ops.mix import mix64, unmix64
from tessera.kernels.triton_ops.packed import packed_fake_quantise, packed_gather, packed_update, update
from tessera.kernels.triton_ops.pool import pool, pool_backward
from tessera.kernels.triton_ops.quantise import dequantise, quantise
from tessera.kernels.triton_ops.random import normal, uniform
from tessera.kernels.triton_ops.records import records_gather, records_update
from tessera.kernels.triton_ops.records_add import records_add
from tessera.kernels.triton_ops.records_find import find_and_list, records_find
from tessera.kernels.triton_ops.scatter import scatter, scatter_columns
from tessera.kernels.triton_ops.touch import expired, touch
from tessera.kernels.triton_ops.unique import unique_inverse
from tessera.kernels.triton_ops.unique_tables import merge_look_ups, positions_of, unique_padded, unique_tables

__all__ = [
    "check",
    "cold_add",
    "cold_list",
    "cold_look",
    "cold_order",
    "cold_scan",
    "cold_take",
    "cold_tell",
    "coldest",
    "copy_rows",
    "dequantise",
    "erase_places",
    "expired",
    "find_and_list",
    "gather",
    "hex_to_int64",
    "id_map_erase",
    "id_map_find",
    "id_map_insert",
    "id_map_place",
    "init_rows",
    "latest_of_bags",
    "merge_look_ups",
    "mix64",
    "normal",
    "pack_ids",
    "packed_gather",
    "packed_learn_scales",
    "packed_fake_quantise",
    "packed_update",
    "pool",
    "pool_backward",
    "positions_of",
    "quantise",
    "read_ids",
    "records_add",
    "records_find",
    "records_gather",
    "records_read",
    "records_update",
    "records_write",
    "scatter",
    "scatter_columns",
    "take_places",
    "touch",
    "uniform",
    "unique_inverse",
    "unique_padded",
    "unique_tables",
    "unmix64",
    "update",
    "xxh64",
]
