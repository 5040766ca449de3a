"""Declare the ops of `torch.ops.tessera` once: an op has the parameters of its definition in `kernels/reference`.

The schema is made of the definition's signature, and torch checks the C++ function against it when the library is
loaded. So an op's parameters are written in its definition, in C++ and in Triton, and there is no further list of them.
Shapes for tracing (fake kernels) stand beside the public functions; those of ops that return nothing are here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tessera.kernels.reference import (
    copy_rows,
    gather,
    id_map,
    initialise,
    latest,
    message,
    mix,
    packed,
    pool,
    quantise,
    random,
    records,
    scatter,
    string_hash,
    take_places,
    touch,
    unique,
    update,
)

#: Definitions of all ops in torch, and the tensors that they change in place.
_DEFINITIONS: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
    (string_hash.xxh64, ()),
    (string_hash.hex_to_int64, ()),
    (mix.mix64, ()),
    (mix.unmix64, ()),
    (random.uniform, ()),
    (random.normal, ()),
    (unique.unique_inverse, ()),
    (unique.unique_tables, ()),
    (unique.positions_of, ()),
    (latest.latest_of_bags, ()),
    (message.pack_ids, ()),
    (message.read_ids, ()),
    (id_map.id_map_find, ()),
    (id_map.id_map_insert, ("directory", "chunks", "segments", "counters")),
    (id_map.id_map_erase, ("chunks", "segments", "counters")),
    (gather.gather, ()),
    (pool.pool, ()),
    (pool.pool_backward, ()),
    (scatter.scatter, ("chunks",)),
    (scatter.scatter_columns, ("chunks",)),
    (copy_rows.copy_rows, ("target",)),
    (initialise.init_rows, ("chunks",)),
    (update.update, ("chunks",)),
    (quantise.quantise, ()),
    (quantise.dequantise, ()),
    (packed.packed_gather, ()),
    (packed.packed_update, ("chunks", "held")),
    (packed.packed_fake_quantise, ()),
    (packed.packed_learn_scales, ("chunks",)),
    (records.records_find, ("chunks",)),
    (records.records_add, ("chunks",)),
    (records.records_gather, ()),
    (records.records_read, ()),
    (records.records_write, ("chunks",)),
    (records.records_update, ("chunks",)),
    (take_places.take_places, ("places",)),
    (touch.touch, ("chunks",)),
    (touch.expired, ()),
    (touch.coldest, ()),
)
OPS = {definition.__name__: (definition, changed) for definition, changed in _DEFINITIONS}


def schema_of(name: str) -> str:
    """Return the schema of an op, without its namespace."""
    definition, changed = OPS[name]
    schema = torch.library.infer_schema(definition, mutates_args=changed)
    return name + schema.replace("SymInt", "int")  # compiled functions take numbers that are known


def define() -> torch.library.Library:
    """Define all ops. The definitions last as long as what is returned."""
    library = torch.library.Library("tessera", "FRAGMENT")
    for name in OPS:
        schema = schema_of(name)
        library.define(schema)
        if schema.endswith("-> ()"):
            torch.library.register_fake(f"tessera::{name}", _nothing, lib=library)
    return library


def register_triton(library: torch.library.Library) -> None:
    """Register the GPU versions of all ops. Triton is imported by the first call of one."""
    for name in OPS:
        library.impl(name, _triton_op(name), "CUDA")


def _nothing(*arguments: Any, **named: Any) -> None:
    return None


def _triton_op(name: str) -> Callable[..., Any]:
    def op(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module("tessera.kernels.triton_ops"), name)(*arguments, **named)

    return op
