"""Shard a model's tables over the ranks by torchrec's planner."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimator
from torchrec.distributed.planner.estimator.types import HardwarePerfConfig
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan, ShardingType

from tessera.distributed.distinct_ids import ALL_TABLES
from tessera.distributed.module_names import module_name
from tessera.distributed.plan import describe, size
from tessera.distributed.rank import Process
from tessera.distributed.tables import PrefilledTables, ShardedTables, Tables
from tessera.distributed.torchrec.row_sharding import ShardedDynamicCollection
from tessera.embedding.errors import ConfigError

RESERVED = 0.2  # share of memory left for the dense side, its optimizer and batches


def shard(
    network: nn.Module, tables: Tables, process: Process, batch_size: int
) -> tuple[DistributedModelParallel, str]:
    """Wrap `network` (which holds `tables`) for this job: tables row-wise over the ranks, the rest data parallel.

    Args:
        batch_size: rows per rank and step, for the planner's estimates.

    Returns:
        the sharded model and the plan as text.

    Raises:
        ConfigError: the tables do not fit the ranks' memory.
    """
    sizes, memory = tables.sizes(), _memory_per_rank(process)
    sharders, plan = [], ShardingPlan({})
    try:
        if isinstance(tables, ShardedTables):  # the planner has no plan for nothing
            sharders = tables.sharders()
            plan = _planner(tables, process, batch_size).collective_plan(network, sharders, dist.group.WORLD)
    except PlannerError:
        need = sum(table.bytes for table in sizes)
        raise ConfigError(
            f"the tables do not fit: {size(need)} over {process.world_size} rank(s) of {size(memory)}, of which "
            f"{RESERVED:.0%} is kept for the rest; lower embedding.rows or add ranks"
        ) from None
    sharded = DistributedModelParallel(
        network,
        device=process.device,
        plan=plan,
        sharders=sharders,
        # One rank has nobody to average gradients with, and needs no copies of them.
        init_data_parallel=process.world_size > 1,
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    if isinstance(tables, PrefilledTables):
        tables.fill()
    notes = [one.note for one in sharded.modules() if isinstance(one, ShardedDynamicCollection) and one.note]
    return sharded, "\n".join([describe(sizes, process.world_size, process.device.type, memory), *notes])


def _planner(tables: ShardedTables, process: Process, batch_size: int) -> EmbeddingShardingPlanner:
    topology = _topology(process)
    one = ParameterConstraints(sharding_types=[ShardingType.ROW_WISE.value], compute_kernels=[tables.compute_kernel])
    constraints = {name: one for name in (ALL_TABLES, *(module_name(table.name) for table in tables.sizes()))}

    class Hardware(HardwarePerfConfig):
        """Bandwidths for the estimator, which knows none for kernels that are not torchrec's and raises without one."""

        kernel_device_bandwidths = {
            ("cpu", EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value): topology.ddr_mem_bw,
            ("cuda", EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value): topology.hbm_mem_bw,
        }

    estimators = [
        EmbeddingPerfEstimator(topology=topology, constraints=constraints, config=Hardware()),
        EmbeddingStorageEstimator(topology=topology, constraints=constraints),
    ]
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        enumerator=EmbeddingEnumerator(
            topology=topology, constraints=constraints, batch_size=batch_size, estimator=estimators
        ),
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
        debug=False,
    )


def _topology(process: Process) -> Topology:
    memory = _memory_per_rank(process)
    on_gpu = process.device.type == "cuda"
    return Topology(
        world_size=process.world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        compute_device=process.device.type,
        hbm_cap=memory if on_gpu else None,
        ddr_cap=None if on_gpu else memory,
    )


def _memory_per_rank(process: Process) -> int:
    """Return the bytes that this rank may use: its GPU, or its share of the host's memory."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_properties(process.device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
