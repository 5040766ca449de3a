"""The ops of `torch.ops.tessera`: their schemas where no compiled library brings them, and their GPU versions.

The compiled library (`csrc/library.cpp`) defines the schemas and registers the ops for CPU. Without it they are defined
here, so that fake kernels and GPU versions exist on a machine that has torch and Triton alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

SCHEMAS = (
    "xxh64(Tensor data, Tensor offsets) -> Tensor",
    "hex_to_int64(Tensor data, Tensor offsets) -> (Tensor, Tensor)",
    "mix64(Tensor x) -> Tensor",
    "unmix64(Tensor x) -> Tensor",
    "uniform(int stream, Tensor ids, int dim) -> Tensor",
    "normal(int stream, Tensor ids, int dim) -> Tensor",
    "unique_inverse(Tensor ids) -> (Tensor, Tensor, Tensor)",
    "id_map_find(Tensor directory, Tensor[] chunks, Tensor ids) -> Tensor",
    "id_map_insert(Tensor(a!) directory, Tensor(b!)[] chunks, Tensor(c!) segments, Tensor(d!) counters, Tensor ids, "
    "Tensor rows) -> ()",
    "id_map_erase(Tensor directory, Tensor(a!)[] chunks, Tensor(b!) segments, Tensor(c!) counters, Tensor ids) -> "
    "Tensor",
    "gather(Tensor[] chunks, Tensor rows, int dim, Tensor? inverse, Tensor? default, int begin) -> Tensor",
    "pool(Tensor values, Tensor index, Tensor offsets, Tensor? weights, int keys, int[] widths) -> Tensor[]",
    "pool_backward(Tensor[] grads, Tensor index, Tensor offsets, Tensor? weights, int rows) -> Tensor",
    "scatter(Tensor(a!)[] chunks, Tensor rows, Tensor values, int begin) -> ()",
    "scatter_columns(Tensor(a!)[] chunks, Tensor rows, Tensor[] parts, int begin) -> ()",
    "copy_rows(Tensor[] source, Tensor rows, Tensor(a!)[] target, Tensor places) -> ()",
    "init_rows(Tensor(a!)[] chunks, Tensor rows, Tensor ids, int dim, bool bell, float offset, float scale, "
    "int stream, float state) -> ()",
    "update(Tensor(a!)[] chunks, Tensor rows, Tensor grads, Tensor? inverse, str optimizer, float learning_rate, "
    "float weight_decay, float eps, float beta1, float beta2, float beta, float l1, float l2) -> ()",
    "quantise(Tensor values, Tensor? steps, int format, bool nearest, Tensor ids, int stream) -> Tensor",
    "dequantise(Tensor stored, Tensor? steps, int format, int dim) -> Tensor",
    "packed_gather(Tensor[] chunks, Tensor rows, int[] layout, Tensor? inverse) -> Tensor",
    "packed_update(Tensor(a!)[] chunks, Tensor rows, Tensor grads, Tensor? inverse, Tensor ids, int[] layout, "
    "str optimizer, float[] hyper, int stream, bool nearest, Tensor(b!)? held) -> ()",
    "packed_look_ahead(Tensor[] chunks, Tensor rows, Tensor held, int[] layout, Tensor? inverse) -> Tensor",
    "packed_learn_steps(Tensor(a!)[] chunks, Tensor rows, Tensor held, Tensor grads, Tensor? inverse, Tensor ids, "
    "int[] layout, str optimizer, float gradient_scale, float[] hyper, int stream, bool nearest) -> ()",
    "take_places(Tensor(a!) places, Tensor rows, int taken) -> Tensor",
    "touch(Tensor(a!)[] chunks, Tensor rows, Tensor now, Tensor? counts) -> ()",
    "expired(Tensor[] chunks, int limit, int begin, int end) -> Tensor",
    "coldest(Tensor[] chunks, int column, int k, int begin, int end, Tensor? keep) -> Tensor",
)


def register(defined: bool, triton: bool) -> torch.library.Library:
    """Define the ops unless they are defined, and register their GPU versions if there is a Triton to run them.

    Triton is imported by the first call of an op. The registrations last as long as what is returned.
    """
    library = torch.library.Library("tessera", "FRAGMENT")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        if not defined:
            library.define(schema)
        if triton:
            library.impl(name, _triton_op(name), "CUDA")
    return library


def _triton_op(name: str) -> Callable[..., Any]:
    def op(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module("tessera.kernels.triton_ops"), name)(*arguments, **named)

    return op
