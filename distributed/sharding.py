"""Shard a model's tables over the ranks by torchrec's planner, and say the plan in plain words."""

from __future__ import annotations

import os
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingType

from distributed.process import Process
from distributed.static_tables import SPARSE_OPTIMIZERS, RowWiseSharder, StaticTables, initialise
from embedding.errors import ConfigError


class SparseOptimizer(Protocol):
    """How rows are updated: see `shard`."""

    name: str
    lr: float
    eps: float


def shard(
    network: nn.Module, tables: StaticTables, process: Process, optimizer: SparseOptimizer, batch_size: int, seed: int
) -> tuple[DistributedModelParallel, str]:
    """Wrap `network` (which holds `tables`) for this job: tables row-wise over the ranks, the rest data parallel.

    Args:
        optimizer: the update of rows: `name` (sgd, adagrad, rowwise_adagrad), `lr`, `eps`.
        batch_size: rows per rank and step, for the planner's estimates.

    Returns:
        the sharded model and the plan as text.

    Raises:
        ConfigError: unknown optimizer, or the tables do not fit the ranks' memory.
    """
    if optimizer.name not in SPARSE_OPTIMIZERS:
        expected = ", ".join(SPARSE_OPTIMIZERS)
        raise ConfigError(f"optimizer.sparse.name is {optimizer.name!r}; expected one of {expected}")
    fused = {"optimizer": SPARSE_OPTIMIZERS[optimizer.name], "learning_rate": optimizer.lr, "eps": optimizer.eps}
    sharder = RowWiseSharder(fused_params=fused)
    topology = _topology(process)
    constraint = ParameterConstraints(sharding_types=[ShardingType.ROW_WISE.value], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints={table.name: constraint for table in tables.tables},
        # What the dense side, its optimizer and batches may need beside the tables.
        storage_reservation=FixedPercentageStorageReservation(0.2),
        debug=False,
    )
    try:
        plan = planner.collective_plan(network, [sharder], dist.group.WORLD)
    except PlannerError as error:
        need = sum(map(tables.bytes_of, tables.tables))
        raise ConfigError(
            f"the tables do not fit: {_size(need)} of rows over {process.world_size} ranks, "
            f"{_size(_memory_per_rank(process))} each; lower embedding.rows or add ranks "
            f"(planner: {str(error).splitlines()[0]})"
        ) from None
    sharded = DistributedModelParallel(
        network,
        device=process.device,
        plan=plan,
        sharders=[sharder],
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    initialise(tables.ebc, tables.tables, seed)
    return sharded, describe(tables, process, optimizer.name)


def _topology(process: Process) -> Topology:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    memory = _memory_per_rank(process)
    on_gpu = process.device.type == "cuda"
    return Topology(
        world_size=process.world_size,
        local_world_size=local,
        compute_device=process.device.type,
        hbm_cap=memory if on_gpu else None,
        ddr_cap=None if on_gpu else memory,
    )


def _memory_per_rank(process: Process) -> int:
    """Bytes this rank may count on: its GPU, or its share of the host's memory."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_properties(process.device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def describe(tables: StaticTables, process: Process, optimizer: str) -> str:
    """The plan as text: what each table takes, on which ranks, and why."""
    world = process.world_size
    state_floats = {"sgd": lambda dim: 0, "adagrad": lambda dim: dim, "rowwise_adagrad": lambda dim: 1}[optimizer]
    lines = [
        f"{len(tables.tables)} tables, row-wise over {world} rank{'s' if world > 1 else ''} on {process.device.type}: "
        "rows are spread evenly by a mixed id, so no rank is a hot spot",
        f"{'table':<24}{'rows':>12}{'dim':>6}{'weights':>12}{'state':>12}{'per rank':>12}  features",
    ]
    total = 0
    for table in tables.tables:
        weights, state = tables.bytes_of(table), tables.rows * state_floats(table.dim) * 4
        total += weights + state
        lines.append(
            f"{table.name:<24}{tables.rows:>12,}{table.dim:>6}{_size(weights):>12}{_size(state):>12}"
            f"{_size(-(-(weights + state) // world)):>12}  {', '.join(table.features)}"
        )
    lines.append(f"in all {_size(total)}, {_size(-(-total // world))} per rank of {_size(_memory_per_rank(process))}")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
