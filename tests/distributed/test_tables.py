"""Each kind of tables has what can be asked of it, and no method that does nothing."""

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.no_tables import NoTables
from tessera.distributed.static_tables import StaticTables
from tessera.distributed.tables import (
    DynamicTablesProtocol,
    PrefilledTables,
    ShardedTables,
    Tables,
    as_dynamic,
    as_sharded,
    owned_tables,
)
from tessera.embedding.config import DynamicTableConfig, Group, TableConfig
from tessera.embedding.optim import RowOptimizer


def no_tables():
    return NoTables({"v": 8, "w": 1})


def static_tables():
    return StaticTables({"v": [TableConfig("t", 8, ("a",), 0.1)]}, ["a"], 10, RowOptimizer("sgd"), seed=1)


def dynamic_tables():
    return DynamicTables([DynamicTableConfig("t", ("a",), (Group("v", 8, 0.1),), RowOptimizer("sgd"))], ["a"], 10)


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (no_tables, {Tables}),
        (static_tables, {Tables, ShardedTables, PrefilledTables}),
        (dynamic_tables, {Tables, ShardedTables, DynamicTablesProtocol}),
    ],
)
def test_kinds_have_what_they_can_do(make, kinds):
    tables = make()
    every = {Tables, ShardedTables, PrefilledTables, DynamicTablesProtocol}
    assert {kind for kind in every if isinstance(tables, kind)} == kinds
    assert as_sharded(tables) is (tables if ShardedTables in kinds else None)
    assert as_dynamic(tables) is (tables if DynamicTablesProtocol in kinds else None)


def test_only_dynamic_tables_are_owned():
    assert owned_tables(no_tables()) == owned_tables(static_tables()) == {}


def test_no_tables_look_up_nothing():
    tables = no_tables()
    ids = KeyedJaggedTensor(keys=[], values=torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(0), stride=3)
    embeddings = tables(ids)
    assert {name: tuple(values.shape) for name, values in embeddings.items()} == {"v": (3, 0, 8), "w": (3, 0, 1)}
    assert tables.squares_looked_up(embeddings) == 0 and tables.sizes() == [] and tables.tensors() == {}
