"""Dynamic tables under torchrec's row-wise sharding: the few places where its classes let a kernel of one's own in.

torchrec plans, shards and holds the tables. Where tables answer with rows, ids, rows and gradients travel in messages
of our own, one each (`id_exchange.py`), instead of torchrec's input and output dist.
Bags go torchrec's way: it moves raw 64-bit ids unchanged when each table claims as many rows as there are ranks (block
size 1): the owner of a value is then the value modulo the ranks. We send mixed ids, so owners are balanced whatever the
ids are.
`tests/distributed/test_torchrec_contract.py` fails when a torchrec release moves one of these places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, TypeVar

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
from torchrec.distributed.sharding.rw_sharding import BaseRwEmbeddingSharding, RwSparseFeaturesDist
from torchrec.distributed.types import (
    Awaitable,
    CommOp,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tessera.distributed.distinct_ids import DistinctIds
from tessera.distributed.event_times import packed
from tessera.distributed.id_exchange import IdExchange, OutgoingIds, ReceivedIds, SentIds
from tessera.distributed.ownership import owner_of
from tessera.distributed.torchrec.answers import answer
from tessera.distributed.torchrec.kernel import DynamicTableKernel

T = TypeVar("T")

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


class ByOwner(KeyedJaggedTensor):
    """Features grouped by the rank that owns their values. What goes to each rank is counted in one pass over the keys;
    torchrec's own way sums them up anew for each rank, which takes 13 ms for 1,024 ranks."""

    @classmethod
    def of(cls, features: KeyedJaggedTensor) -> ByOwner:
        return cls(
            keys=features.keys(),
            values=features.values(),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
            stride=features.stride(),
        )

    def dist_splits(self, key_splits: list[int]) -> list[list[int]]:
        lengths = _sums(self.length_per_key(), key_splits)
        weights = [] if self.weights_or_none() is None else [lengths]
        return [_sums(self.stride_per_key(), key_splits), lengths, *weights]


def _sums(numbers: list[int], counts: list[int]) -> list[int]:
    """Return the sums of so many numbers each, one part behind the other."""
    rest = iter(numbers)
    return [sum(islice(rest, count)) for count in counts]


class SendByOwner(nn.Module):
    """torchrec's exchange of features, `dist`, of which all have one stride."""

    def __init__(self, dist: nn.Module) -> None:
        super().__init__()
        self._inner = dist

    def forward(self, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        return self._inner(ByOwner.of(features))


class RawIdsDist(RwSparseFeaturesDist):
    """Sends each value, unchanged, to the rank that is the value modulo the ranks."""

    unbucketize_permute_tensor: Tensor | None

    def forward(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        if self._world_size == 1:  # all ids are this rank's, in the order that they have
            self.unbucketize_permute_tensor = None
            return self._dist(sparse_features)
        if sparse_features.values().device.type == "cpu":
            return super().forward(sparse_features)
        return self.by_sort(sparse_features)

    def by_sort(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Do the same by a stable sort. On a GPU fbgemm groups the values of a sequence by rank with one thread per
        bag, and all distinct ids of a table are one bag here; and it leaves the order in bags that are summed to a
        race."""
        grouped, places = by_owner(sparse_features, self._world_size)
        self.unbucketize_permute_tensor = places if self._is_sequence else None
        return self._dist(grouped)


def by_owner(features: KeyedJaggedTensor, ranks: int) -> tuple[KeyedJaggedTensor, Tensor]:
    """Group features by the rank that owns each value, one rank after the other, in the order that they had; also
    return the place that each value has taken, int64 [n]. Equivalent to fbgemm's `block_bucketize_sparse_features`."""
    values, lengths, weights = features.values(), features.lengths(), features.weights_or_none()
    owner, bags = owner_of(values, ranks), lengths.numel()
    bag = torch.repeat_interleave(lengths, output_size=values.numel())
    counts = torch.zeros(ranks * bags, dtype=lengths.dtype, device=lengths.device)
    counts.index_add_(0, owner * bags + bag, torch.ones_like(bag, dtype=lengths.dtype))
    order = owner.short().argsort(stable=True)  # 16 bits are sorted in a quarter of the passes
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    grouped = KeyedJaggedTensor(
        keys=features.keys() * ranks,
        values=values[order],
        weights=None if weights is None else weights[order],
        lengths=counts,
        stride=features.stride(),
    )
    return grouped, places


def raw_ids_dist(sharding: BaseRwEmbeddingSharding, is_sequence: bool, device: torch.device | None) -> RawIdsDist:
    """Return the input dist of dynamic tables."""
    features = sharding._get_num_features()
    found = RawIdsDist(
        pg=sharding._pg,
        num_features=features,
        feature_hash_sizes=[sharding._pg.size()] * features,
        device=device or sharding._device,
        is_sequence=is_sequence,
        has_feature_processor=sharding._has_feature_processor,
        need_pos=False,
        keep_original_indices=True,
    )
    found._dist = SendByOwner(found._dist)
    return found


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


class Ready(Awaitable[T]):
    """What need not be waited for; unlike torchrec's `NoWait` without a mark in a profile, which takes time."""

    def __init__(self, value: T) -> None:
        self._value = value

    def wait(self) -> T:
        return self._value

    def _wait_impl(self) -> T:
        return self._value


class SentRows(Awaitable[Awaitable[ReceivedIds]]):
    """torchrec's form of `SentIds`."""

    def __init__(self, sent: SentIds) -> None:
        super().__init__()
        self._sent = sent

    @property
    def told(self) -> Tensor:
        return self._sent.told

    def _wait_impl(self) -> Awaitable[ReceivedIds]:
        return Ready(self._sent.received())


class DynamicSharding(RwSequenceEmbeddingSharding):
    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> DynamicLookup:
        return DynamicLookup(self._grouped_embedding_configs, self._pg, device or self._device, self._env)


class ShardedDynamicCollection(HasKernels, ShardedEmbeddingCollection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group = self._env.process_group
        self._exchange = IdExchange(group) if group is not None and group.size() > 1 else None

    def received(self, features: Any) -> Iterator[tuple[DynamicTableKernel, Any]]:
        (kernel,) = self.kernels()
        yield kernel, features

    def input_dist(self, ctx: EmbeddingCollectionContext, features: Any) -> Awaitable[Awaitable[ReceivedIds]]:
        """Begin to send ids to their owners. features: `AskedRows`."""
        assert isinstance(features, AskedRows)
        ids, told = features.ids, features.told
        column = packed(ids.counts, ids.times)
        if self._exchange is None:
            bounds = [0, *accumulate(ids.of_tables)]
            return Ready(Ready(ReceivedIds(ids.mixed, (column,), bounds)))
        told = torch.empty(0, dtype=torch.float64) if told is None else told
        return SentRows(self._exchange.send(OutgoingIds(ids.mixed, ids.bounds, (column,), told)))

    def compute_and_output_dist(self, ctx: EmbeddingCollectionContext, input: Any) -> Awaitable[Tensor]:
        """Return the rows of all ids in the order of `DistinctIds`, float32 [n, dim]."""
        (kernel,) = self.kernels()
        rows = kernel(input)
        if self._exchange is None:
            return Ready(rows)
        both = (self.qcomm_codecs_registry or {}).get(CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name)
        return Ready(answer(rows, input.route, self._exchange.group, both))

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
    """Shards an EmbeddingCollection of dynamic tables. `fused_params`: `table_configs`, `dims`, `tells_missing`."""

    @property
    def sharded_module_type(self) -> type[ShardedDynamicCollection]:
        return ShardedDynamicCollection
