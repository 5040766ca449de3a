"""Tensors of any kind come back exactly, on any number of ranks, and descriptions that lie are refused."""

import json

import pytest
import torch
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

from tessera.distributed.saved import dense
from tessera.distributed.saved.dense import copy_of, load_into, load_tensors, save_tensors, tensor_shapes
from tessera.distributed.saved.manifest import CheckpointError, SavedFolder
from tessera.distributed.saved.storage import Storage, seal
from tests.distributed.crafted import mutations, pickled
from tests.ranks import on_ranks

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def saved(folder, storage=None) -> SavedFolder:
    storage = storage or Storage(folder)
    return SavedFolder(storage, storage.written or {p: seal(storage.read(p)) for p in storage.all_files()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_type_shape_and_name_come_back(tmp_path, process, monkeypatch, dtype):
    monkeypatch.setattr(dense, "PIECE_BYTES", 100)
    matrix = torch.arange(221).reshape(17, 13).to(getattr(torch, dtype))
    tensors = {
        "tower/a.b/c": matrix,
        'tower/"quoted" ü\n../x': matrix.t(),
        "tower/every other": matrix[::2, ::3],
        "tower/the same memory": matrix,
        "tower/scalar": matrix[3, 4],
        "tower/empty": matrix[:0],
        "tower/no width": matrix[:, :0],
        "rank/0/vector": matrix[:, 5],
        "": matrix[0],
    }
    storage = Storage(tmp_path)
    save_tensors(storage, tensors, process)
    folder = saved(tmp_path, storage)
    assert len(folder.names("dense")) > 5
    assert tensor_shapes(folder) == {name: (t.shape, t.dtype) for name, t in tensors.items()}
    found = load_tensors(folder, lambda name: True)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert load_tensors(folder, lambda name: name.startswith("rank/")).keys() == {"rank/0/vector"}


def shards(process, rows: int, width: int = 4):
    """A table whose values are its places, dealt to ranks as torchrec deals rows."""
    block = -(-rows // process.world_size)
    begin, end = (min(rows, n * block) for n in (process.rank, process.rank + 1))
    values = torch.arange(begin * width, end * width, dtype=torch.float32).reshape(end - begin, width)
    shard = Shard.from_tensor_and_offsets(values, [begin, 0], process.rank)
    return init_from_local_shards([shard] if end > begin else [], rows, width)


def save_shards(process, folder):
    dense.PIECE_BYTES = 64  # four rows
    tensors = {"tables/large": shards(process, 40), "tables/small": shards(process, 2), "tower/x": torch.ones(3)}
    tensors[f"rank/{process.rank}/rng"] = torch.tensor([process.rank])
    save_tensors(Storage(folder), {name: copy_of(value) for name, value in tensors.items()}, process)


def load_shards(process, folder):
    """Whether every shard has the values of its places, and how many files were opened for them."""
    opened = []
    read = SavedFolder.read
    SavedFolder.read = lambda storage, path: (opened.append(path), read(storage, path))[1]
    right = True
    for name, rows in (("tables/large", 40), ("tables/small", 2)):
        mine, expected = shards(process, rows), shards(process, rows)
        for shard in mine.local_shards():
            shard.tensor.zero_()
        load_into(saved(folder), {name: mine})
        pairs = zip(mine.local_shards(), expected.local_shards(), strict=True)
        right &= all(torch.equal(one.tensor, other.tensor) for one, other in pairs)
    ranks = load_tensors(saved(folder), lambda name: name.startswith("rank/"))
    SavedFolder.read = read
    return right, {name: value.item() for name, value in ranks.items()}, len({p for p in opened if "safe" in p})


def test_shards_of_three_ranks_are_read_by_any_number_and_by_each_only_its_own(tmp_path, process):
    on_ranks(3, save_shards, tmp_path)
    files = [path for path in Storage(tmp_path).all_files() if path.endswith(".safetensors")]
    assert len(files) == 5 + 4 + 4  # of at most four rows
    names = {f"rank/{rank}/rng": rank for rank in range(3)}
    (right, ranks, opened) = load_shards(process, tmp_path)
    assert right and ranks == names and opened == len(files)
    for right, ranks, opened in on_ranks(2, load_shards, tmp_path):
        assert right and ranks == names and opened <= 9


@pytest.fixture
def small(tmp_path, process):
    storage = Storage(tmp_path)
    save_tensors(storage, {"tower/a": torch.ones(3, 2), "tower/b": torch.zeros(())}, process)
    return tmp_path


def test_descriptions_that_lie_are_one_line(small):
    path = small / "dense" / "00000-of-00001.json"
    tried = 0
    for what, changed in mutations(json.loads(path.read_text())):
        path.write_text(json.dumps(changed))
        try:
            load_tensors(saved(small), lambda name: True)
        except CheckpointError as error:
            assert "\n" not in str(error), what
            tried += 1
    assert tried > 80


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, (2**62).to_bytes(8, "little") + b"{}", "pickle"])
def test_other_files_than_safetensors_are_one_line(small, tmp_path, content):
    file = small / "dense" / "00000-of-00001-000.safetensors"
    file.write_bytes(pickled(tmp_path / "marker") * 9 if content == "pickle" else content)
    with pytest.raises(CheckpointError, match="no safetensors file|cannot hold"):
        load_tensors(saved(small), lambda name: True)
    assert not (tmp_path / "marker").exists()


def test_values_of_another_shape_or_type_than_described_are_refused(small):
    path = small / "dense" / "00000-of-00001.json"
    text = path.read_text().replace('"float32"', '"int32"')
    path.write_text(text)
    with pytest.raises(CheckpointError, match="does not hold tower/"):
        load_tensors(saved(small), lambda name: True)
    with pytest.raises(CheckpointError, match=r"found \[3, 2\] for tower/a; expected \[2\]"):
        load_into(saved(small), {"tower/a": torch.zeros(2)})
