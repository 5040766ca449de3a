"""The dense side of a state by torch.distributed.checkpoint: tensors by name, whole ones and shards of static tables.

Names that only one rank has ("rank/1/rng") are saved too; each rank may read all of them.
"""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distributed.checkpoint_files import Storage

FOLDER = "dense"
Tensors = dict[str, Tensor | ShardedTensor]


class _Files(FileSystemBase):
    """Lets torch.distributed.checkpoint write through a `Storage`, so that its files have checksums like all others."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with self._storage.write(str(path)) if "w" in mode else self._storage.open(str(path)) as stream:
            yield stream

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        self._storage.rename(str(path), str(new_path))
        self._storage.written[str(new_path)] = self._storage.written.pop(str(path))

    def init_path(self, path: str | os.PathLike) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        self._storage.make(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def exists(self, path: str | os.PathLike) -> bool:
        return self._storage.exists(str(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        self._storage.remove(str(path))


def save_tensors(storage: Storage, tensors: Tensors, group: dist.ProcessGroup | None) -> None:
    """Write the tensors that this rank has. A tensor that several ranks have is written once.

    Raises CheckpointException on all ranks if one fails.
    """
    writer = FileSystemWriter(FOLDER, sync_files=False)  # `Storage.write` syncs
    writer.fs, writer.path = _Files(storage), FOLDER
    dcp.save(tensors, storage_writer=writer, process_group=group)


def tensor_shapes(storage: Storage) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> shape and dtype of every tensor saved."""
    metadata = _reader(storage).read_metadata()
    return {
        name: (one.size, one.properties.dtype)
        for name, one in metadata.state_dict_metadata.items()
        if isinstance(one, TensorStorageMetadata)
    }


def load_tensors(storage: Storage, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Tensors whose names are wanted, whole, on the host."""
    found = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensor_shapes(storage).items() if wanted(name)
    }
    if found:
        load_into(storage, found)
    return found


def load_into(storage: Storage, tensors: Tensors) -> None:
    """Fill tensors in place, each rank its own shards. Names and whole shapes must be those that were saved."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads what it needs by itself
        dcp.load(tensors, storage_reader=_reader(storage), no_dist=True)


def _reader(storage: Storage) -> FileSystemReader:
    reader = FileSystemReader(Path(FOLDER))
    reader.fs, reader.path = _Files(storage), FOLDER
    return reader


def copy_of(tensor: Tensor | ShardedTensor) -> Tensor | ShardedTensor:
    """The same values in host memory that training does not touch."""
    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().to("cpu", copy=True)
    shards = [
        Shard(shard.tensor.detach().to("cpu", copy=True), _on_host(shard.metadata)) for shard in tensor.local_shards()
    ]
    metadata = copy.deepcopy(tensor.metadata())
    metadata.shards_metadata = [_on_host(shard) for shard in metadata.shards_metadata]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, metadata, process_group=tensor._process_group
    )


def _on_host(shard: ShardMetadata) -> ShardMetadata:
    assert shard.placement is not None
    return ShardMetadata(shard.shard_offsets, shard.shard_sizes, f"rank:{shard.placement.rank()}/cpu")
