"""Dynamic tables under torchrec's row-wise sharding: the few places where its classes let a kernel of one's own in.

torchrec plans, shards and holds the tables. Ids, rows and gradients travel in messages of our own, one each
(`id_exchange.py`), instead of torchrec's input and output dist. The owner of an id is its mixed number modulo the
ranks, so owners are balanced whatever the ids are.
`tests/distributed/test_torchrec_contract.py` fails when a torchrec release moves one of these places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import (
    EmbeddingCollectionContext,
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import (
    BaseGroupedFeatureProcessor,
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
)
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.types import (
    Awaitable,
    CommOp,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)

from tessera.distributed.distinct_ids import DistinctIds
from tessera.distributed.event_times import packed
from tessera.distributed.host_exchange import HostExchange, SentByHost
from tessera.distributed.hosts import described, host_groups
from tessera.distributed.id_exchange import IdExchange, OutgoingIds, ReceivedIds, SentIds
from tessera.distributed.torchrec.answers import answer
from tessera.distributed.torchrec.kernel import DynamicTableKernel
from tessera.distributed.torchrec.ready import Ready

DYNAMIC = EmbeddingComputeKernel.CUSTOMIZED_KERNEL


class DynamicLookup(GroupedEmbeddingsLookup):
    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        env: ShardingEnv | None = None,
    ) -> DynamicTableKernel:
        assert config.compute_kernel is DYNAMIC, config.compute_kernel
        return DynamicTableKernel(config, pg, device)


class HasKernels:
    """Mixin for sharded collections that gives access to the kernels inside."""

    _lookups: list[Any]  # torchrec's

    def received(self, features: Any) -> Iterator[tuple[DynamicTableKernel, Any]]:
        """Yield each kernel with the features that it will be asked for."""
        for lookup, one in zip(self._lookups, features, strict=True):
            yield from zip(lookup._emb_modules, one.split(lookup._feature_splits), strict=True)

    def kernels(self) -> list[DynamicTableKernel]:
        return [kernel for lookup in self._lookups for kernel in lookup._emb_modules]


@dataclass(frozen=True)
class AskedRows:
    """What a rank asks for, and what it tells all others with it, float64 [n]."""

    ids: DistinctIds
    told: Tensor | None = None


class SentRows(Awaitable[Awaitable[ReceivedIds]]):
    """torchrec's form of what is on its way, without a mark in a profile, which takes time."""

    def __init__(self, sent: SentIds | SentByHost) -> None:
        super().__init__()
        self._sent = sent

    @property
    def told(self) -> Tensor:
        return self._sent.told

    def wait(self) -> Awaitable[ReceivedIds]:
        return Ready(self._sent.received())

    _wait_impl = wait


class DynamicSharding(RwSequenceEmbeddingSharding):
    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> DynamicLookup:
        return DynamicLookup(self._grouped_embedding_configs, self._pg, device or self._device, self._env)


class ShardedDynamicCollection(HasKernels, ShardedEmbeddingCollection):
    def __init__(
        self, module: nn.Module, params: Any, env: ShardingEnv, fused: dict[str, Any], *args: Any, **options: Any
    ) -> None:
        super().__init__(module, params, env, fused, *args, **options)
        group, wait = env.process_group, fused["by_host_seconds"]
        hosts = None if wait is None or group is None else host_groups(group, wait)
        self.note = None if wait is None else described(hosts)  # for the user
        self._exchange: IdExchange | HostExchange | None = None
        if group is not None and group.size() > 1:
            self._exchange = IdExchange(group) if hosts is None else HostExchange(hosts)

    def received(self, features: Any) -> Iterator[tuple[DynamicTableKernel, Any]]:
        (kernel,) = self.kernels()
        yield kernel, features

    def input_dist(self, ctx: EmbeddingCollectionContext, features: Any) -> Awaitable[Awaitable[ReceivedIds]]:
        """Begin to send ids to their owners. features: `AskedRows`."""
        assert isinstance(features, AskedRows)
        ids, told = features.ids, features.told
        column = packed(ids.counts, ids.times)
        if self._exchange is None:
            return Ready(Ready(ReceivedIds(ids.mixed, (column,), ids.bounds)))
        return SentRows(self._exchange.send(OutgoingIds(ids.mixed, ids.bounds, (column,), told)))

    def compute_and_output_dist(self, ctx: EmbeddingCollectionContext, input: Any) -> Awaitable[Tensor]:
        """Return the rows of all ids in the order of `DistinctIds`, float32 [n, dim]."""
        (kernel,) = self.kernels()
        rows = kernel(input)
        if self._exchange is None:
            return Ready(rows)
        both = (self.qcomm_codecs_registry or {}).get(CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name)
        return Ready(answer(rows, input.route, both))

    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> DynamicSharding:
        assert sharding_type == ShardingType.ROW_WISE.value, sharding_type
        return DynamicSharding(
            sharding_infos=sharding_infos, env=env, device=device, qcomm_codecs_registry=qcomm_codecs_registry
        )


class RowWiseDynamic:
    """Mixin for sharders of dynamic tables: they are sharded by rows, on our own kernel."""

    fused_params: dict[str, Any] | None  # these three are the sharder's
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None
    sharded_module_type: Any

    def shard(
        self,
        module: nn.Module,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> nn.Module:
        sharded: nn.Module = self.sharded_module_type(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )
        return sharded

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [DYNAMIC.value]


class DynamicSharder(RowWiseDynamic, EmbeddingCollectionSharder):
    """Shards an EmbeddingCollection of dynamic tables. `fused_params`: `table_configs`, `dims`, `tells_missing`,
    `by_host_seconds` (longest wait in an exchange by host, None: it is flat)."""

    @property
    def sharded_module_type(self) -> type[ShardedDynamicCollection]:
        return ShardedDynamicCollection
