"""The plan for GPUs, which can be made without one: what kernels tables run on, and where their rows are."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tessera.distributed import sharding
from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.rank import Process
from tessera.distributed.static_tables import StaticTables
from tessera.embedding.config import DynamicTableConfig, Group, TableConfig
from tessera.embedding.optim import RowOptimizer

RANKS, ROWS = 2, 1000


def static_tables():
    return StaticTables({"v": [TableConfig("t", 8, ("a",), 0.1)]}, ["a"], ROWS, RowOptimizer("rowwise_adagrad"), 1)


def dynamic_tables():
    config = DynamicTableConfig("t", ("a",), (Group("v", 8, 0.1),), RowOptimizer("adam"))
    return DynamicTables([config], ["a"], ROWS)


@pytest.mark.parametrize(("tables", "kernel"), [(static_tables, "fused"), (dynamic_tables, "customized_kernel")])
def test_static_tables_run_on_fbgemms_kernels_and_dynamic_ones_on_ours(monkeypatch, tables, kernel):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(RANKS))
    monkeypatch.setattr(sharding, "_memory_per_rank", lambda process: 80 << 30)
    process = Process(0, 0, RANKS, torch.device("cuda", 0), dist.HashStore())
    network = torch.nn.Module()
    network.tables = tables()
    plan = sharding._planner(network.tables, process, 64).plan(network, network.tables.sharders())
    (tables_of_plan,) = plan.plan.values()
    (found,) = tables_of_plan.values()
    assert (found.sharding_type, found.compute_kernel) == ("row_wise", kernel)
    assert [str(shard.placement) for shard in found.sharding_spec.shards] == ["rank:0/cuda:0", "rank:1/cuda:1"]
