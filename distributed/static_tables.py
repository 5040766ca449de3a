"""Tables with a fixed number of rows on torchrec's stock fbgemm kernels, sharded row-wise.

A raw 64-bit id is mixed and reduced to a row number, so different ids may share a row; the number of rows is the
price. Output is the same for any number of ranks: initial rows depend on (seed, table, row) alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ShardingType

from tessera.distributed.fields import OnDevice, scale_to_mean
from tessera.distributed.module_names import module_name
from tessera.distributed.plan import TableSize
from tessera.distributed.torchrec.ids_prefetch import IdsPrefetch
from tessera.embedding.config import TableConfig
from tessera.embedding.errors import ConfigError
from tessera.embedding.optim import RowOptimizer
from tessera.kernels.mix import mix64
from tessera.kernels.random import normal

SPARSE_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
STATE_FLOATS: dict[str, Callable[[int], int]] = {
    "sgd": lambda dim: 0,
    "adagrad": lambda dim: dim,
    "rowwise_adagrad": lambda dim: 1,
}
INIT_CHUNK_FLOATS = 1 << 24  # initial rows are drawn in pieces of 64 MiB, so that start-up needs no second table


class StaticTables(nn.Module):
    """All tables of a model as one EmbeddingBagCollection, grouped by what the tower asked for.

    Args:
        groups: name of a group (DeepFM: "v" and "w") -> its tables. Every group covers every id feature once.
        id_names: the id features, in the order in which a group's output lists the fields.
        rows: rows of each table.
        optimizer: how rows are updated: sgd, adagrad or rowwise_adagrad.
        seed: with the table and the row it fixes a row's initial values.
        weighted: ids carry weights, which scale their rows before pooling.
        averaged: the features whose bags are averaged over their ids; the others are summed.

    Raises:
        ConfigError: an optimizer that the stock kernels do not have.
    """

    compute_kernel = EmbeddingComputeKernel.FUSED.value

    def __init__(
        self,
        groups: dict[str, Sequence[TableConfig]],
        id_names: Sequence[str],
        rows: int,
        optimizer: RowOptimizer,
        seed: int,
        *,
        weighted: bool = False,
        averaged: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.tables = [table for tables in groups.values() for table in tables]
        self.rows, self.optimizer, self.seed = rows, optimizer, seed
        if optimizer.name not in SPARSE_OPTIMIZERS:
            expected = ", ".join(SPARSE_OPTIMIZERS)
            found = f"optimizer.sparse.name is {optimizer.name!r}"
            raise ConfigError(f"{found}; static tables have {expected} (embedding=dynamic has more)")
        self.ebc = EmbeddingBagCollection(
            device=torch.device("meta"),
            is_weighted=weighted,
            tables=[
                EmbeddingBagConfig(
                    name=module_name(table.name),
                    embedding_dim=stored_dim(table.dim),
                    num_embeddings=rows,
                    feature_names=list(table.features),
                    pooling=PoolingType.SUM,
                )
                for table in self.tables
            ],
        )
        self._fields = len(id_names)
        self._dims = [tables[0].dim for tables in groups.values()]
        self._averaged = OnDevice([name in averaged for name in id_names]) if averaged else None
        self._prefetched: deque[tuple[KeyedJaggedTensor, IdsPrefetch]] = deque()
        self._groups = list(groups)
        self._output_keys = [_output_keys(tables, id_names, self.tables) for tables in groups.values()]

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return group -> [B, fields, dim] float32, zeros for empty bags. ids: raw int64 ids, stride B."""
        if self._prefetched and self.training:
            prefetched, sent = self._prefetched.popleft()
            assert prefetched is ids, "another batch was prepared for this step"
            pooled = sent.answer()
        else:
            pooled = self.ebc(self._to_rows(ids))
        outputs = KeyedTensor.regroup([pooled], self._output_keys)
        embeddings = {
            group: output.unflatten(1, (self._fields, -1))[..., :dim]
            for group, dim, output in zip(self._groups, self._dims, outputs, strict=True)
        }
        if self._averaged is None:
            return embeddings
        # Averaged here and not by torchrec: its row-wise mean divides the wrong outputs where a summed feature is
        # looked up in several tables.
        scale_bf1 = scale_to_mean(ids, self._averaged).t().unsqueeze(2)
        return {group: emb_bfd * scale_bf1 for group, emb_bfd in embeddings.items()}

    @property
    def tells(self) -> bool:
        return False

    @torch.no_grad()
    def begin(self, ids: KeyedJaggedTensor, times: Tensor | None = None, told: Tensor | None = None) -> Any:
        """Begin to send the ids of a coming training batch to the owners of their rows. Collective; as that of
        `DynamicTables`."""
        assert self.training
        self._prefetched.append((ids, IdsPrefetch(self.ebc, self._to_rows(ids))))
        return self._prefetched[-1]

    def send_begun(self) -> None:
        """Go on with what `begin` started, as long as the device is busy. Collective."""
        for _, sent in self._prefetched:
            sent.send()

    def squares_looked_up(self, embeddings: dict[str, Tensor]) -> Tensor:
        """Return the sum of squares of the looked-up rows, float32 [], as `DynamicTables` does; only for features with
        one id a row, whose embeddings are their rows."""
        return sum((emb_bfd.square().sum() for emb_bfd in embeddings.values()), torch.zeros(()))

    def _to_rows(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(
            keys=ids.keys(),
            values=torch.remainder(mix64(ids.values()), self.rows),
            weights=ids.weights_or_none(),
            lengths=ids.lengths(),
            offsets=ids.offsets(),
            stride=ids.stride(),
        )

    def sharders(self) -> list[RowWiseSharder]:
        optimizer = self.optimizer
        kind = SPARSE_OPTIMIZERS[optimizer.name]
        return [RowWiseSharder({"optimizer": kind, "learning_rate": optimizer.lr, "eps": optimizer.eps})]

    def sizes(self) -> list[TableSize]:
        state = STATE_FLOATS[self.optimizer.name]
        return [
            TableSize(table.name, table.features, self.rows, table.dim, 4 * (width + state(width)))
            for table in self.tables
            for width in [stored_dim(table.dim)]
        ]

    @torch.no_grad()
    def fill(self) -> None:
        """Draw this rank's first rows. Called after sharding, which gives CPU tables values of its own."""
        by_name = {module_name(table.name): table for table in self.tables}
        for key, value in self.ebc.state_dict().items():
            table = by_name[key.split(".")[-2]]
            for shard in value.local_shards():
                _fill(shard.tensor, shard.metadata.shard_offsets[0], table, self.seed)

    def tensors(self) -> dict[str, Any]:
        """Return weights and optimizer state as live shards, by the names under which they are saved."""
        names = {module_name(table.name): table.name for table in self.tables}

        def readable(name: str) -> str:
            """Return a name such as embedding_bags.t_<quoted>.weight or t_<quoted>.momentum1 with the table's own
            name."""
            return ".".join(names.get(part, part) for part in name.split("."))

        weights = {f"tables/{readable(name)}": value for name, value in self.ebc.state_dict().items()}
        state = self.ebc.fused_optimizer.state_dict()["state"]
        return weights | {
            f"tables.optimizer/{readable(name)}/{readable(key)}": value
            for name, one in state.items()
            for key, value in one.items()
        }

    def restart(self) -> None:
        """Reset to the state before the first step."""
        for name, value in self.tensors().items():
            if name.startswith("tables.optimizer/"):
                for shard in value.local_shards():
                    shard.tensor.zero_()
        self.fill()


def stored_dim(dim: int) -> int:
    """Return the stored width of a row: fbgemm stores rows in units of 4 floats. The surplus never has a gradient;
    row-wise Adagrad averages squared gradients over it too, so that a group of dim 1 learns at twice the configured
    rate."""
    return -(-dim // 4) * 4


def _output_keys(
    tables: Sequence[TableConfig], id_names: Sequence[str], all_tables: Sequence[TableConfig]
) -> list[str]:
    """Return torchrec's names of the pooled outputs: the feature, or feature@table if several tables share the
    feature."""
    owner = {feature: table for table in tables for feature in table.features}
    assert sorted(owner) == sorted(id_names), "a group of tables covers every id feature once"
    shared = {name: sum(name in table.features for table in all_tables) > 1 for name in id_names}
    return [f"{name}@{module_name(owner[name].name)}" if shared[name] else name for name in id_names]


class RowWiseSharder(EmbeddingBagCollectionSharder):
    """Sharder that offers row-wise sharding on the CPU as well; the stock one does so on GPUs only."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value]


def _fill(rows: Tensor, first: int, table: TableConfig, seed: int) -> None:
    count, width = rows.shape
    chunk = max(1, INIT_CHUNK_FLOATS // width)
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        ids = torch.arange(first + start, first + stop)
        rows[start:stop].copy_(normal(seed, table.key, ids, width).mul_(table.init_std))
