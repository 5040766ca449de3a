"""Dynamic tables whose bags are summed by the owners of their rows, under torchrec's row-wise pooled sharding.

A rank sends each id of a bag to its owner, an owner answers with one sum per bag over the ids that it owns, and the
asking rank adds the sums of all owners. As in `row_sharding.py` ids travel mixed in messages of our own, and the places
where torchrec lets this in are held by `tests/distributed/test_torchrec_contract.py`. torchrec's own way back, a
reduce-scatter, wants equally many rows on all ranks under gloo and adds in the precision that it sends in.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import BaseEmbeddingDist, EmbeddingShardingContext, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import (
    BaseGroupedFeatureProcessor,
    GroupedEmbeddingConfig,
    KJTList,
    ShardingType,
)
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.types import (
    Awaitable,
    CommOp,
    LazyAwaitable,
    NoWait,
    QuantizedCommCodecs,
    ShardingEnv,
)
from torchrec.sparse.jagged_tensor import KeyedTensor

from tessera.distributed.event_times import latest
from tessera.distributed.fields import OnDevice, chosen
from tessera.distributed.id_exchange import IdExchange
from tessera.distributed.torchrec.bags_exchange import AskedBags, OwnedBags, owned_alone, send_bags
from tessera.distributed.torchrec.kernel import DynamicTableKernel, Request
from tessera.distributed.torchrec.ready import Ready
from tessera.distributed.torchrec.row_sharding import DYNAMIC, HasKernels, RowWiseDynamic
from tessera.kernels.autograd import apply
from tessera.kernels.host_numbers import on_device
from tessera.kernels.unique import unique_tables


class DynamicBagKernel(DynamicTableKernel):
    """The same tables with pooled output: weighted sums over bags. The ids of all features of a table are merged before
    its look-up."""

    def __init__(self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None):
        super().__init__(config, pg, device)
        self.repeats = False
        self._features = [len(table.feature_names) for table in config.embedding_tables]
        self._ranks = pg.size() if pg is not None else 1
        self._last: tuple[Tensor, Request] | None = None

    def _names_of_tables(self, config: GroupedEmbeddingConfig) -> list[str]:
        return [table.name for table in config.embedding_tables]

    def forward(self, features: OwnedBags) -> Tensor:
        """Return weighted sums over bags, [stride, features * n], zeros for an empty bag. features: one key per
        feature, values mixed ids, stride = rows of all ranks; n: the columns of one answer."""
        request = self.next_request(features)
        rows = self.rows(request)
        self._last = (rows, request) if self.training else None
        assert request.places is not None
        sums = F.embedding_bag(
            request.places,
            rows,
            features.offsets().long(),
            mode="sum",
            per_sample_weights=features.weights_or_none(),
            include_last_offset=True,
        )
        return sums.view(sum(self._features), features.stride(), rows.shape[1]).transpose(0, 1).flatten(1)

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return, for the last forward pass in training, the sum of squares of the rows of all look-ups that came here,
        divided as the gradients of sums are on their way here; and by table the number of look-ups without a row."""
        assert self._last is not None, "no forward pass in training"
        (rows, request), self._last = self._last, None
        counts = request.counts.to(rows)
        values = rows[:, :-1] if self.tells_missing else rows
        squares = (values.square().sum(1) * counts).sum() / (self._ranks if get_gradient_division() else 1)
        if not self.tells_missing:
            return squares, counts.new_zeros(len(self.tables))
        missing = (rows[:, -1].detach() * counts).split(request.bounds.diff().tolist())
        return squares, torch.stack([one.sum() for one in missing])

    def request(self, features: OwnedBags) -> Request:
        ends_of_features = features.offset_per_key()
        ends = on_device(
            [ends_of_features[end] for end in accumulate(self._features, initial=0)], features.values().device
        )
        distinct, places, occurrences, bounds = unique_tables(features.values(), ends)
        times = None if features.times is None else latest(features.times, places, distinct.numel())
        return Request(distinct, occurrences, times, bounds, places)


class DynamicBagLookup(GroupedPooledEmbeddingsLookup):
    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None = None,
        env: ShardingEnv | None = None,
    ) -> DynamicBagKernel:
        assert config.compute_kernel is DYNAMIC, config.compute_kernel
        return DynamicBagKernel(config, pg, device)


class SumsOfOwners(BaseEmbeddingDist[EmbeddingShardingContext, Tensor, Tensor]):
    """Brings the partial sums of all owners to the rank that asked, and adds them in the order of ranks."""

    def __init__(self, pg: dist.ProcessGroup, codecs: QuantizedCommCodecs | None) -> None:
        super().__init__()
        self._pg, self._codecs = pg, codecs

    def forward(self, local_embs: Tensor, sharding_ctx: EmbeddingShardingContext | None = None) -> Awaitable[Tensor]:
        """Map local_embs [rows of all ranks, n] to [rows of this rank, n]."""
        rows = sharding_ctx.batch_size_per_rank if sharding_ctx is not None else []
        rows = rows or [local_embs.shape[0]]
        return NoWait(apply(_SumOfOwners, local_embs, rows, self._pg, self._codecs))


class _SumOfOwners(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, partial: Tensor, rows: list[int], pg: dist.ProcessGroup, codecs: QuantizedCommCodecs | None
    ) -> Tensor:
        ctx.rows, ctx.pg, ctx.codecs = rows, pg, codecs
        ranks, mine = len(rows), rows[dist.get_rank(pg)]
        sent = partial.contiguous() if codecs is None else codecs.forward.encode(partial).contiguous()
        received = sent.new_empty(ranks * mine, sent.shape[1])
        dist.all_to_all_single(received, sent, [mine] * ranks, rows, group=pg)
        sums = received if codecs is None else codecs.forward.decode(received)
        return sums.view(ranks, mine, partial.shape[1]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the whole sum for each owner's sum."""
        ranks, mine = len(ctx.rows), ctx.rows[dist.get_rank(ctx.pg)]
        sent = grad if ctx.codecs is None else ctx.codecs.backward.encode(grad)
        received = sent.new_empty(sum(ctx.rows), sent.shape[1])
        dist.all_to_all_single(received, sent.repeat(ranks, 1), ctx.rows, [mine] * ranks, group=ctx.pg)
        grads = received if ctx.codecs is None else ctx.codecs.backward.decode(received)
        # As in torchrec: gradients are averaged over ranks, like those of data parallel weights.
        return grads.div_(ranks) if get_gradient_division() else grads, None, None, None


class DynamicBagSharding(RwPooledEmbeddingSharding):
    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> DynamicBagLookup:
        return DynamicBagLookup(
            self._grouped_embedding_configs,
            pg=self._pg,
            device=device or self._device,
            sharding_type=ShardingType.ROW_WISE,
            env=self._env,
        )

    def create_output_dist(self, device: torch.device | None = None) -> SumsOfOwners:
        registry = self.qcomm_codecs_registry or {}
        return SumsOfOwners(self._pg, registry.get(CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name))


class ShardedDynamicBags(HasKernels, ShardedEmbeddingBagCollection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group = self._env.process_group
        self._exchange = IdExchange(group, has_room=False) if group is not None and group.size() > 1 else None
        (sharding,) = self._embedding_shardings
        self._features: list[str] = sharding.feature_names()
        self._places: OnDevice | None = None  # of them among those of a batch

    def input_dist(self, ctx: EmbeddingBagCollectionContext, features: Any) -> Awaitable[Awaitable[KJTList]]:
        """Begin to send bags to the owners of their ids. features: `AskedBags`."""
        assert isinstance(features, AskedBags)
        if self._places is None:
            self._places = OnDevice([features.bags.keys().index(name) for name in self._features])
        if self._features != features.bags.keys():
            features = replace(features, bags=chosen(features.bags, self._places))
        ctx.sharding_contexts.append(EmbeddingShardingContext())
        if self._exchange is None:
            return Ready(Ready(KJTList([owned_alone(features)])))
        return send_bags(self._exchange, features)

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Return the sums of the bags, by feature."""
        ctx.sharding_contexts[0].batch_size_per_rank = input[0].rows_of_ranks
        return super().compute_and_output_dist(ctx, input)

    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> DynamicBagSharding:
        sharding_type = sharding_infos[0].param_sharding.sharding_type
        assert sharding_type == ShardingType.ROW_WISE.value, sharding_type
        return DynamicBagSharding(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)


class DynamicBagSharder(RowWiseDynamic, EmbeddingBagCollectionSharder):
    """Shards an EmbeddingBagCollection of dynamic tables; `fused_params` as those of `DynamicSharder`."""

    @property
    def sharded_module_type(self) -> type[ShardedDynamicBags]:
        return ShardedDynamicBags
