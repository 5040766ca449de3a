"""Compile every Triton kernel for GPUs that need not be at hand: `python -m tests.kernels.compile_kernels 80 90`.

The ops are called on small CPU tensors with their launches recorded instead of started; each distinct launch is then
compiled with the types, constants and hints that Triton would give it. What the interpreter lets pass and a compiler
does not is found so. Prints one line per kernel and target: variants, lines of PTX of the longest.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tessera.kernels import triton_ops
from tessera.kernels.formats import FORMATS
from tessera.kernels.layout import RowLayout, packed_layout, plain_layout
from tessera.kernels.message_layout import MessageLayout
from tessera.kernels.optimizers import OPTIMIZERS, OptimizerSettings
from tessera.kernels.record_layout import record_layout
from tessera.kernels.records import keys_of
from tessera.kernels.reference.id_map import SEGMENTS_PER_CHUNK, SLOTS
from tessera.kernels.triton_ops import launch

DTYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
SETTINGS = OptimizerSettings(0.1, l1=0.1, l2=0.2, gradient_scale=0.5)


def type_of(argument: object, specialised: bool) -> object:
    """What Triton takes an argument for; None: a constant."""
    if isinstance(argument, torch.Tensor):
        return "*fp64" if argument.dtype == torch.float64 else DTYPES[argument.dtype]
    if isinstance(argument, tuple):
        found = [type_of(one, specialised=True) for one in argument]
        assert None not in found and "i32" not in found, "Triton would compile anew for some integers"
        return type(argument)(*found)
    if isinstance(argument, float):
        return "fp32"
    if argument == 1 and specialised:
        return None
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


class Recorder:
    """Keeps every distinct launch as what the compiler is asked for."""

    def __init__(self) -> None:
        self.found: dict[tuple, tuple] = {}

    def __call__(self, kernel, arguments: tuple, constants: dict) -> None:
        constants = dict(constants)
        warps = constants.pop("num_warps")
        signature, values, hints = {}, {}, {}
        for place, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=False)):
            found = type_of(argument, not parameter.do_not_specialize)
            signature[parameter.name] = found or "constexpr"
            if found is None:
                values[(place,)] = 1
            inner = {(place, i): one for i, one in enumerate(argument)} if isinstance(argument, tuple) else {}
            for where, one in (inner or {(place,): argument}).items():
                if isinstance(one, torch.Tensor) and one.data_ptr() % 16 == 0:
                    hints[where] = [["tt.divisibility", 16]]
        for name, value in constants.items():
            place = next(parameter.num for parameter in kernel.params if parameter.name == name)
            signature[name], values[(place,)] = "constexpr", value
        assert len(signature) == len(kernel.params), (kernel, signature)
        key = (kernel, str(signature), str(values), warps)
        self.found[key] = (kernel, signature, values, hints, warps)


def ids(n: int) -> torch.Tensor:
    return torch.arange(n) * 7919


def call_plain(n: int, dim: int) -> None:
    """Ops on plain rows and on ids."""
    rows, inverse, values = ids(n), ids(n), torch.zeros((n, dim))
    triton_ops.mix64(rows), triton_ops.unmix64(rows)
    triton_ops.uniform(5, rows, dim), triton_ops.normal(5, rows, dim)
    for dtype in DTYPES:
        chunks = [torch.zeros((8, dim), dtype=dtype)] * 2
        triton_ops.gather(chunks, rows, dim, None, None, 0)
        triton_ops.gather(chunks, rows, dim, inverse, torch.zeros(dim, dtype=dtype), 0)
        triton_ops.scatter(chunks, rows, torch.zeros((n, dim), dtype=dtype), 0)
        triton_ops.scatter(chunks, rows, torch.zeros((1, dim), dtype=dtype), 0)
    chunks = [torch.zeros((8, dim + 2))] * 2
    for weights in (None, values[:, 0]):
        for widths in ([dim], [dim - 1, 1]):
            triton_ops.pool(values, inverse, torch.arange(n + 1), weights, 1, widths)
        triton_ops.pool_backward([values.unsqueeze(1)], inverse, torch.arange(n + 1), weights, n)
    for distribution, scale in (("normal", 1.0), ("uniform", 1.0), ("uniform", 0.0)):
        triton_ops.init_rows(chunks, rows, rows, dim, distribution, (0.0, scale, 0.1), 2**40 + 1)
    meta = [torch.zeros((8, 4), dtype=torch.int64)]
    triton_ops.touch(meta, rows, rows[:1], None)
    triton_ops.touch(meta, rows, rows, rows)
    triton_ops.expired(meta, 2**33, 0, 8)
    for optimizer in OPTIMIZERS:
        layout = plain_layout(dim, optimizer)
        chunks = [torch.zeros((8, layout.bytes // 4))]
        triton_ops.update(chunks, rows, values, None, layout, SETTINGS)
        triton_ops.update(chunks, rows, values, inverse, layout, SETTINGS)


def call_packed(n: int, layout: RowLayout) -> None:
    """Ops on packed rows and on formats."""
    rows, inverse, values, steps = ids(n), ids(n), torch.zeros((n, layout.dim)), torch.ones(n)
    chunks, stream = [torch.zeros((8, layout.bytes), dtype=torch.uint8)], 2**40 + 1
    for nearest, positions in ((1, None), (0, inverse)):
        one = layout._replace(nearest=nearest)
        stored = triton_ops.quantise(values, steps, one.format_number, rows, stream, one.rounding)
        batch = chunks, rows, rows, values, positions
        triton_ops.packed_gather(chunks, rows, one, positions)
        triton_ops.packed_update(*batch, None, one, SETTINGS, stream)
        triton_ops.packed_update(*batch, None, one, SETTINGS, stream, steps)
        if layout.learned:
            held = values.clone()
            triton_ops.packed_update(*batch, held, one, SETTINGS, stream)
            triton_ops.packed_fake_quantise(chunks, rows, held, one, positions)
            triton_ops.packed_learn_scales(*batch, held, one, SETTINGS, stream)
    triton_ops.dequantise(stored, steps, layout.format_number, layout.dim)


def call_id_map(n: int) -> None:
    directory, counters = torch.zeros(4, dtype=torch.int32), torch.ones(3, dtype=torch.int64)
    chunks = [torch.zeros((SEGMENTS_PER_CHUNK, SLOTS, 2), dtype=torch.int64)]
    segments = torch.full((SEGMENTS_PER_CHUNK, 3), 1000, dtype=torch.int32)
    for tables in (None, ids(n)):
        triton_ops.id_map_find(directory, chunks, ids(n), tables)
        triton_ops.id_map_insert(directory, chunks, segments, counters, ids(n), ids(n), tables)
    found = triton_ops.id_map.Map(directory, chunks)
    found.find(ids(n), None, with_places=True)
    triton_ops.id_map_erase(directory, chunks, segments, counters, ids(n), None)
    hashes, words = found.take_out(torch.zeros(1, dtype=torch.int64))
    found.place(hashes, None, words, hashed=True)


def call_records(n: int, groups: list[RowLayout], *, whole: bool) -> None:
    """Ops on records and those of many tables at once."""
    tables = 3
    layout = record_layout(groups)
    chunks = [torch.zeros((rows, layout.bytes), dtype=torch.uint8) for rows in (8, 8, 16)]
    directory = torch.zeros(4, dtype=torch.int32)
    places = directory, [torch.zeros((4, SLOTS, 2), dtype=torch.int64)], torch.full((4, 3), 1000, dtype=torch.int32)
    rows, bounds, numbers = ids(n), torch.arange(tables + 1) * (n // tables), layout.numbers
    for now, counts in ((None, None), (rows[:1], rows), (rows, None)) if whole else ():
        triton_ops.records_find(*places[:2], chunks, rows, bounds, now, counts, numbers)
    with contextlib.suppress(IndexError):  # nothing is computed here: it finds as many as memory happens to say
        triton_ops.find_and_list(places, chunks, rows, bounds, rows, rows, numbers)
        most = torch.zeros(tables, dtype=torch.int64)
        triton_ops.find_and_list(places, chunks, rows, bounds, 1, rows, numbers, most)
    call_cold_queue((chunks, numbers), places[:2], tables, n)
    with contextlib.suppress(IndexError):
        triton_ops.unique_padded(rows, bounds, mixed=True)
        triton_ops.merge_look_ups(rows, bounds, rows.int(), rows, mixed=True)
        triton_ops.merge_look_ups(rows, bounds, None, None, mixed=False)
    triton_ops.positions_of(rows, rows)
    keys = keys_of(0, [[(1, 2, 0.1) for _ in groups]] * tables)
    first = (0.5, *(0.1 for _ in groups))
    for now, counts in ((rows[:1], rows), (rows, None)) if whole else ((rows[:1], rows),):
        triton_ops.records_add(chunks, rows, rows, rows, now, counts, *keys, numbers, first, 1)
    rates = torch.full((tables,), 0.1, dtype=torch.float64)
    for inverse in (None, rows):
        triton_ops.records_gather(chunks, rows, numbers, inverse)
    for order in (None, rows):
        begins = None if order is None else torch.arange(n + 1)
        grads = torch.zeros((n, layout.width))
        triton_ops.records_update(chunks, rows, grads, order, begins, keys.numbers, rates, numbers, SETTINGS, 1, 0)
    noted = record_layout(groups, decay_floats=2)
    chunks, numbers = [torch.zeros((size, noted.bytes), dtype=torch.uint8) for size in (8, 8, 16)], noted.numbers
    triton_ops.records_gather(chunks, rows, numbers, None, rates)
    triton_ops.records_update(chunks, rows, grads, None, None, keys.numbers, rates, numbers, SETTINGS, 1, 0, rates, 0.5)


def call_messages(n: int) -> None:
    """With room and without, with ends of kinds and with numbers of 2 and 4 bytes, all kinds of columns and none."""
    columns, told = (ids(n), ids(n).int(), torch.zeros(n)), torch.zeros(2, dtype=torch.float64)
    for room, kinds, given in ((8, 3, columns), (0, 3, ()), (8, 40, columns[:2]), (8, 70_000, columns[:1])):
        layout = MessageLayout(room, kinds, 2, tuple(column.element_size() for column in given))
        triton_ops.pack_ids(ids(n), torch.zeros(kinds + 1, dtype=torch.int64), given, told, (2, 6, 2), layout.numbers)
        message = torch.zeros((2, layout.words), dtype=torch.int64)
        triton_ops.read_ids(message, torch.zeros((0, 6), dtype=torch.int32), n, layout.numbers)


def call_cold_queue(records: tuple[list[torch.Tensor], tuple[int, ...]], places: tuple, tables: int, n: int) -> None:
    entries, numbers = torch.zeros((5, n), dtype=torch.int64), torch.zeros((4, tables), dtype=torch.int64)
    begins, others = torch.zeros(tables + 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    flags, sums, _ = triton_ops.cold_look(records, entries, others, n, begins, numbers)
    triton_ops.cold_order(entries, flags, ids(n), n, tables)
    triton_ops.cold_take(records, places, (entries, flags, sums, begins), numbers[:2], n)
    triton_ops.cold_add(records, ids(n), entries, others, n, numbers)
    _, counts = triton_ops.cold_scan(records, numbers, n)
    triton_ops.cold_list(records, numbers, n, counts, ids(n))


def record(whole: bool) -> Recorder:
    """whole: every combination, else each kernel and each format and optimizer once."""
    launch.recorder = recorder = Recorder()
    for n, dim in ((200, 16), (1, 1), (200, 128), (3, 45)) if whole else ((200, 16),):
        call_plain(n, dim)
    call_id_map(200)
    call_messages(200)
    pairs = itertools.product(FORMATS, OPTIMIZERS) if whole else zip(FORMATS, (*OPTIMIZERS, "sgd"), strict=True)
    layouts = [packed_layout(format, dim, name) for format, name in pairs for dim in ((16, 5) if whole else (16,))]
    layouts += [packed_layout("int4", 16, name, learned=True) for name in OPTIMIZERS[: 4 if whole else 1]]
    layouts.append(packed_layout("int8", 16, "adam", learned=True, state_format="bf16"))
    for layout in layouts:
        call_packed(200, layout)
    call_records(200, [plain_layout(16, "rowwise_adagrad"), plain_layout(1, "rowwise_adagrad")], whole=whole)
    for optimizer in OPTIMIZERS if whole else ():
        call_records(3, [plain_layout(45, optimizer), plain_layout(1, optimizer)], whole=True)
        call_records(200, [packed_layout(format, 16, optimizer) for format in FORMATS], whole=True)
    if whole:
        moments = packed_layout("bf16", 16, "adam", state_format="bf16")
        call_records(200, [moments, plain_layout(1, "adam")], whole=True)
    return recorder


def compile_one(entry: tuple, capability: int) -> tuple[str, int, int]:
    """(name of the kernel, lines of PTX, loads of 128 bits)."""
    kernel, signature, values, hints, warps = entry
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(built.asm["cubin"]) > 0
    ptx = built.asm["ptx"]
    wide = re.findall(r"ld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)", ptx)
    return kernel.fn.__name__, ptx.count("\n"), len(wide)


def main() -> None:
    capabilities = [int(text) for text in sys.argv[1:] if text.isdigit()] or [90]
    entries = list(record("--whole" in sys.argv).found.values())
    for capability in capabilities:
        counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        with ThreadPoolExecutor(2) as pool:
            for name, lines, wide in pool.map(compile_one, entries, itertools.repeat(capability)):
                counts[name].append((lines, wide))
        for name, found in sorted(counts.items()):
            lines, wide = map(max, zip(*found, strict=True))
            about = f"{len(found)} variants, up to {lines} lines of PTX, {wide} loads of 128 bits"
            print(f"sm_{capability} {name}: {about}", flush=True)


if __name__ == "__main__":
    main()
