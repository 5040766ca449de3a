"""What ids without a row read: zeros or a learned row per table, against a dictionary of rows with autograd."""

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.saved.dense import load_into, save_tensors
from tessera.distributed.saved.manifest import SavedFolder
from tessera.distributed.saved.storage import Storage
from tessera.distributed.sharding import shard
from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tests.distributed.dictionary import IDS, Case, Model, Reference, joined, same, to_kjt, train
from tests.ranks import on_ranks

CASES = {
    "sum": Case(oov="learned", threshold=3),
    "mean": Case(oov="learned", threshold=3, averaged=("a", "b")),
    "weighted": Case(oov="learned", threshold=3, weighted=True, averaged=("b",)),
    "zeros": Case(oov="zeros", threshold=3),
    "all admitted": Case(oov="learned"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_rank_equals_autograd(name):
    expected = Reference(CASES[name]).train()
    same(joined(on_ranks(1, train, CASES[name])), expected)
    if CASES[name].threshold > 1:
        assert 0 < len(expected["rows"]) < 60  # some ids are admitted, some are not


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["sum", "weighted"])
def test_ranks_equal_autograd(world, name):
    same(joined(on_ranks(world, train, CASES[name])), Reference(CASES[name]).train())


@pytest.mark.parametrize("transport", ["fp16", "bf16"])
def test_half_precision_transport(transport):
    """The flag is exact, the rows are rounded."""
    case = Case(oov="learned", threshold=3, transport=transport)
    found, expected = joined(on_ranks(2, train, case)), Reference(case).train()
    same(found, expected, rel=0.1, absolute=0.05)
    assert any(value != 0 for row in found["oov"] for value in row)


def first_two_occurrences(process):
    model = Model(Case(oov="learned", threshold=3))
    sharded, _ = shard(model, model.tables, process, 1)
    with torch.no_grad():
        model.tables.oov += torch.arange(1, 11).view(2, 5)
    ids = to_kjt([[[(7, 1.0)]], [[]], [[]]], weighted=False)
    seen = []
    for now in range(4):
        model.tables.begin_step(now)
        out = model.tables(ids)
        seen.append((out["v"][0, 0].tolist(), len(model.tables.owned()["a"])))
        assert not out["v"][0, 1:].any() and not out["w"][0, 1:].any()  # empty bags stay zero
    sharded.eval()
    other = model.tables(to_kjt([[[(8, 1.0)]], [[(7, 1.0)]], [[]]], weighted=False))
    return seen, other["v"][0].tolist(), other["w"][0].tolist()


def test_the_third_occurrence_gets_a_row_of_its_own():
    ((seen, v, w),) = on_ranks(1, first_two_occurrences)
    assert seen[:2] == [([1.0, 2.0, 3.0, 4.0], 0)] * 2
    assert seen[2] == seen[3] and seen[2][1] == 1 and seen[2][0] != [1.0, 2.0, 3.0, 4.0]
    assert v == [[1.0, 2.0, 3.0, 4.0], [6.0, 7.0, 8.0, 9.0], [0.0] * 4]  # of the table that the feature looks into
    assert w == [[5.0], [10.0], [0.0]]


def test_zeros_cost_no_column_and_have_no_state():
    tables = Case().tables
    zeros = DynamicTables(tables, IDS, 100)
    learned = DynamicTables(tables, IDS, 100, oov="learned")
    widths = [[c.embedding_dim for c in t.collection.embedding_configs()] for t in (zeros, learned)]
    assert widths == [[5], [6]]  # torchrec knows all tables as one
    assert zeros.tensors() == {} and zeros.dense_parameters() == {}


def test_learned_rows_are_saved_and_loaded(process, tmp_path):
    first, second = (DynamicTables(Case().tables, IDS, 100, oov="learned") for _ in range(2))
    with torch.no_grad():
        first.oov.normal_()
    storage = Storage(tmp_path)
    save_tensors(storage, first.tensors(), process)
    load_into(SavedFolder(storage, storage.written), second.tensors())
    assert torch.equal(first.oov, second.oov)


def two_passes(process):
    groups = (Group("v", 4, 0.5, "int8", learned=ScaleOptimizer()),)
    table = DynamicTableConfig("a", ("a",), groups, RowOptimizer("sgd"), admission=Admission("exact", 3))
    tables = DynamicTables([table], ["a"], 100, oov="learned")
    with torch.no_grad():
        tables.oov += 7
    model = torch.nn.Sequential(tables)
    sharded, _ = shard(model, tables, process, 1)
    values, lengths = torch.tensor([1, 1, 1, 2]), torch.tensor([3, 1])  # 1 is admitted, 2 is not
    ids = KeyedJaggedTensor(["a"], values, lengths=lengths)
    tables.begin_step(0, learn_scales=True)
    sharded(ids)["v"].sum().backward()
    before = tables.oov.grad.clone()
    with tables.second_pass():
        out = tables(ids)["v"]
        out.sum().backward()
    return out[:, 0].tolist(), before.tolist(), tables.oov.grad.tolist()


def test_the_second_pass_of_learned_scales_reads_others_and_leaves_them():
    for out, first, second in on_ranks(2, two_passes):
        assert out[1] == [7.0] * 4 and 7.0 not in out[0]
        assert first == second == [[1.0] * 4]
