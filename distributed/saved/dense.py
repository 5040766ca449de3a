"""Save the dense side of a state: tensors by name in safetensors files, with JSON beside. Nothing in them can run code.

Each rank writes what it has: rank 0 the tensors that are the same on all ranks, every rank those called `rank/<r>/…`
and its own shards of static tables. Large tensors are cut into pieces of some MiB along their first dimension, so that
neither side has to hold a table twice, and whoever reads opens only the files that hold rows of its own.

    dense/00000-of-00002.json              file -> tensor -> dtype, shape (of the whole), offset and size (of the piece)
    dense/00000-of-00002-000.safetensors   the pieces, under the names of their tensors
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from tessera.distributed.rank import Process
from tessera.distributed.saved.manifest import LARGEST, CheckpointError, SavedFolder, check, shown
from tessera.distributed.saved.storage import Storage

FOLDER = "dense"
PIECE_BYTES = 1 << 26  # of a tensor, and of a file, at most: that much is held twice while it is written or read
DESCRIPTION = re.compile(r"\d{5}-of-\d{5}\.json")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
}
PATTERN = {str: {str: {"dtype": str, "shape": [int], "offset": [int], "size": [int]}}}
Tensors = dict[str, Tensor | ShardedTensor]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: a box of `size` that begins at `offset` in the whole of `shape`; file: where it is saved."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def meets(self, offset: tuple[int, ...], size: tuple[int, ...]) -> bool:
        """Return whether the piece has elements of another box of the same tensor."""
        return all(
            a < b + m and b < a + n for a, n, b, m in zip(self.offset, self.size, offset, size, strict=True)
        ) and 0 not in (*self.size, *size)


def save_tensors(storage: Storage, tensors: Tensors, process: Process) -> None:
    """Write the tensors and shards of this rank, without waiting for other ranks.

    A tensor that is no shard and is not called `rank/<r>/…` is taken to be the same on all ranks; rank 0 writes it.

    Raises OSError where the storage does.
    """
    own = f"rank/{process.rank}/"
    mine = {n: t for n, t in tensors.items() if isinstance(t, ShardedTensor) or process.is_main or n.startswith(own)}
    stem = f"{FOLDER}/{process.rank:05d}-of-{process.world_size:05d}"
    described: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(_files(mine)):
        file = f"{stem}-{number:03d}.safetensors"
        with storage.write(file) as stream:
            stream.write(save({piece.name: whole_copy(values) for piece, values in group}))
        described[file] = {
            piece.name: {
                "dtype": str(piece.dtype).removeprefix("torch."),
                "shape": piece.shape,
                "offset": piece.offset,
                "size": piece.size,
            }
            for piece, _ in group
        }
    with storage.write(f"{stem}.json") as stream:
        stream.write(json.dumps(described, indent=1).encode())


def _files(tensors: Tensors) -> Iterator[list[tuple[Piece, Tensor]]]:
    """Yield the pieces of each file: pieces of different tensors, of about PIECE_BYTES together."""
    group: dict[str, tuple[Piece, Tensor]] = {}
    held = 0
    for piece, values in _cut(tensors):
        if piece.name in group or (group and held + values.nbytes > PIECE_BYTES):
            yield list(group.values())
            group, held = {}, 0
        group[piece.name] = (piece, values)
        held += values.nbytes
    if group:
        yield list(group.values())


def _cut(tensors: Tensors) -> Iterator[tuple[Piece, Tensor]]:
    """Yield pieces of all tensors and shards, each with its live values."""
    for name, tensor in tensors.items():
        shape = _whole_shape(tensor)
        for offset, values in _boxes(tensor):
            rows = values.shape[0] if values.dim() else 1
            step = max(1, PIECE_BYTES * rows // max(1, values.nbytes))
            for begin in range(0, max(1, rows), step):
                part = values[begin : begin + step] if values.dim() else values
                if not part.numel() and 0 not in shape:
                    continue  # a rank without rows of a small table
                place = (offset[0] + begin, *offset[1:]) if values.dim() else ()
                yield Piece(name, part.dtype, shape, place, tuple(part.shape)), part


def _boxes(tensor: Tensor | ShardedTensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return the parts of a tensor that this rank has, each with its offset in the whole."""
    if not isinstance(tensor, ShardedTensor):
        return [((0,) * tensor.dim(), tensor)]
    return [(tuple(shard.metadata.shard_offsets), shard.tensor) for shard in tensor.local_shards()]


def _whole_shape(tensor: Tensor | ShardedTensor) -> tuple[int, ...]:
    return tuple(tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.shape)


def tensor_shapes(folder: SavedFolder) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every tensor saved, by name.

    Raises CheckpointError: what describes them is not what this version writes.
    """
    return {name: (torch.Size(parts[0].shape), parts[0].dtype) for name, parts in _saved_pieces(folder).items()}


def load_tensors(folder: SavedFolder, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the tensors whose names are wanted, whole, on the host.

    Raises CheckpointError: files are not what this version writes.
    """
    shapes = tensor_shapes(folder)
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items() if wanted(name)}
    load_into(folder, found)
    return found


def load_into(folder: SavedFolder, tensors: Tensors) -> None:
    """Fill tensors in place, each rank its own shards, from what any number of ranks has saved.

    Raises CheckpointError: names or whole shapes are not those that were saved.
    """
    saved = _saved_pieces(folder)
    needed: dict[str, list[tuple[Piece, tuple[int, ...], Tensor]]] = {}
    for name, tensor in tensors.items():
        if name not in saved or saved[name][0].shape != _whole_shape(tensor):
            there = list(saved[name][0].shape) if name in saved else "nothing"
            raise CheckpointError(f"{folder.name}: found {there} for {name}; expected {list(_whole_shape(tensor))}")
        for offset, values in _boxes(tensor):
            for piece in saved[name]:
                if piece.meets(offset, tuple(values.shape)):
                    needed.setdefault(piece.file, []).append((piece, offset, values))
    for file, parts in needed.items():
        content = _read(folder, file)
        for piece, offset, values in parts:
            found = content.get(piece.name)
            if found is None or tuple(found.shape) != piece.size or found.dtype != piece.dtype:
                raise CheckpointError(f"{folder.name}/{file} does not hold {piece.name} as its description says")
            _copy(found, piece.offset, values, offset)


@torch.no_grad()
def _copy(found: Tensor, at: tuple[int, ...], values: Tensor, offset: tuple[int, ...]) -> None:
    """Copy the intersection of two boxes of one tensor."""
    begin = [max(a, b) for a, b in zip(at, offset, strict=True)]
    end = [min(a + n, b + m) for a, n, b, m in zip(at, found.shape, offset, values.shape, strict=True)]
    there = tuple(slice(b - a, e - a) for a, b, e in zip(at, begin, end, strict=True))
    here = tuple(slice(b - a, e - a) for a, b, e in zip(offset, begin, end, strict=True))
    values[here].copy_(found[there])


def _read(folder: SavedFolder, file: str) -> dict[str, Tensor]:
    try:
        return load(folder.read(file))
    except OSError as error:
        raise CheckpointError(f"{folder.name}/{file} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder.name}/{file} is no safetensors file: {error}") from None


def _saved_pieces(folder: SavedFolder) -> dict[str, list[Piece]]:
    """Return the pieces of every tensor, by name, of all ranks that saved.

    Raises CheckpointError: they do not make up their tensors, or no file can hold them.
    """
    found: dict[str, list[Piece]] = {}
    for name in folder.names(FOLDER):
        if DESCRIPTION.fullmatch(name):
            for piece in _described(folder, f"{FOLDER}/{name}"):
                found.setdefault(piece.name, []).append(piece)
    for name, pieces in found.items():
        first = pieces[0]
        same = all((one.shape, one.dtype) == (first.shape, first.dtype) for one in pieces)
        distinct = len({one.offset for one in pieces}) == len(pieces)
        if not same or not distinct or sum(one.numel for one in pieces) != math.prod(first.shape):
            raise CheckpointError(f"{folder.name}: the pieces of {shown(name)} do not make up {list(first.shape)}")
    return found


def _described(folder: SavedFolder, path: str) -> Iterator[Piece]:
    where = f"{folder.name}/{path}"
    try:
        described = json.loads(folder.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from None
    check(described, PATTERN, where)
    for file, tensors in described.items():
        expected = 0
        for name, one in tensors.items():
            dtype, shape, offset, size = (one[key] for key in ("dtype", "shape", "offset", "size"))
            fits = len(shape) == len(offset) == len(size) and all(
                o + n <= whole for o, n, whole in zip(offset, size, shape, strict=True)
            )
            if dtype not in DTYPES or not fits or math.prod(shape) > LARGEST:
                raise CheckpointError(f"{where}: {shown(name)} is {shown(one)}; expected a piece of a tensor")
            expected += math.prod(size) * DTYPES[dtype].itemsize
            yield Piece(name, DTYPES[dtype], tuple(shape), tuple(offset), tuple(size), file)
        if file not in folder.files or folder.files[file].bytes < expected:
            raise CheckpointError(f"{where}: {shown(file)} cannot hold {expected:,} bytes of tensors")


def whole_copy(values: Tensor) -> Tensor:
    """Return the values in host memory of their own, one after the other."""
    return values.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def copy_of(tensor: Tensor | ShardedTensor) -> Tensor | ShardedTensor:
    """Return the same values in host memory that training does not touch."""
    if not isinstance(tensor, ShardedTensor):
        return whole_copy(tensor)
    shards = [Shard(whole_copy(shard.tensor), _on_host(shard.metadata)) for shard in tensor.local_shards()]
    metadata = copy.deepcopy(tensor.metadata())
    metadata.shards_metadata = [_on_host(shard) for shard in metadata.shards_metadata]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, metadata, process_group=tensor._process_group
    )


def _on_host(shard: ShardMetadata) -> ShardMetadata:
    assert shard.placement is not None
    return ShardMetadata(shard.shard_offsets, shard.shard_sizes, f"rank:{shard.placement.rank()}/cpu")
