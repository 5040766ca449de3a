"""The asking side of dynamic tables: ids in, embeddings out, the same on any number of ranks.

Each rank sends an id once per table and batch, however often it occurs and however many groups of embeddings the tower
wants of it: one row of the table holds the values of all groups (DeepFM: v and w). The owners send rows back, and
repeating, pooling and, in the backward pass, summing over repetitions happen here, where the repetitions are.

Ids without a row read zeros or one learned row per table. That row is a dense parameter, a copy on every rank, trained
by the dense optimizer: nearly every batch reads it, with gradients from all ranks, as it reads a weight of the tower.
As a row of the sharded table its owner would be asked for it by all ranks in every step, and an optimizer made for
rare rows would drive it by the sum over thousands of ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from distributed.dynamic_sharding import DYNAMIC, DynamicSharder
from distributed.plan import TableSize
from distributed.table_kernel import Pass
from distributed.transport import codecs
from embedding.config import DynamicTableConfig
from embedding.table import DynamicTable
from kernels.mix import mix64
from kernels.unique import unique_inverse

EXPIRE_ROWS = 1 << 18  # rows of each table that one call of `expire` looks at: about a millisecond


class DynamicTables(nn.Module):
    """All tables of a model as one EmbeddingCollection.

    Args:
        tables: every id feature belongs to exactly one; all have the same groups.
        id_names: the id features, in the order in which a group's output lists the fields.
        expected_rows: rows per table that the planner counts with; tables grow beyond it.
        averaged: the features whose bags are averaged over their ids; the others are summed.
        transport: precision in which rows travel between ranks, see `transport.py`.
        others: what ids without a row read, zeros or the table's learned row (`others` [tables, width], first 0).
    """

    compute_kernel = DYNAMIC.value

    def __init__(
        self,
        tables: Sequence[DynamicTableConfig],
        id_names: Sequence[str],
        expected_rows: int,
        averaged: Collection[str] = (),
        transport: str = "fp32",
        others: str = "zeros",
    ) -> None:
        super().__init__()
        self._transport = transport
        self._asked: tuple[KeyedJaggedTensor, Tensor] | None = None  # by the pass before, for the second one
        self._second = False
        self.tables, self.expected_rows = list(tables), expected_rows
        self.groups = {group.name: group.dim for group in tables[0].groups}
        self.learns_steps = any(table.learns_steps for table in tables)
        self.others = nn.Parameter(torch.zeros(len(tables), tables[0].width)) if others == "learned" else None
        width = tables[0].width + (self.others is not None)  # of an answer
        self.collection = EmbeddingCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingConfig(
                    name=table.name,
                    embedding_dim=width,
                    # The planner counts rows * dim * 4 bytes; a dynamic row has state and bookkeeping as well.
                    num_embeddings=-(-expected_rows * table.bytes_per_row // (4 * width)),
                    feature_names=[table.name],
                )
                for table in tables
            ],
        )
        self._names = [table.name for table in tables]
        self._fields = [[id_names.index(feature) for feature in table.features] for table in tables]
        self._field_count = len(id_names)
        self._averaged = [i for i, name in enumerate(id_names) if name in averaged]

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """ids: raw int64 ids, stride B. Returns group -> [B, fields, dim] float32; an empty bag gives zeros."""
        if not self._second:
            self._asked = self._distinct(ids)
        asked, index = self._asked
        answered = self.collection(asked)
        parts = [answered[name].values() for name in self._names]
        if self.others is not None:
            parts = [self._with_others(part, table) for table, part in enumerate(parts)]
        rows = torch.cat(parts)
        pooled_fbd = self._pool(rows, index, ids).unflatten(0, (self._field_count, -1))
        return dict(zip(self.groups, pooled_fbd.transpose(0, 1).split(list(self.groups.values()), 2), strict=True))

    def _with_others(self, answered: Tensor, table: int) -> Tensor:
        """[n, width + 1] as the owners answer -> [n, width], the learned row where the id has none."""
        # The second pass is for step sizes alone. Data parallel counts gradients: a second one would confuse it.
        others = self.others[table].detach() if self._second else self.others[table]
        return torch.addcmul(answered[:, :-1], answered[:, -1:].detach(), others)

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """By name, what the dense optimizer trains."""
        return {} if self.others is None else {"tables.others": self.others}

    def sharder(self) -> DynamicSharder:
        fused = {
            "table_configs": tuple(self.tables),
            "learning_rate": self.tables[0].optimizer.lr,
            "tells_missing": self.others is not None,
        }
        return DynamicSharder(fused, qcomm_codecs_registry=codecs(self._transport))

    def sizes(self) -> list[TableSize]:
        return [
            TableSize(table.name, table.features, self.expected_rows, table.width, table.bytes_per_row)
            for table in self.tables
        ]

    def fill(self) -> None:
        """Nothing: rows come to be when their ids are seen."""

    def owned(self) -> dict[str, DynamicTable]:
        """This rank's part of each table, after sharding."""
        return {
            name: table
            for kernel in self.collection.kernels()
            for name, table in zip(kernel.names, kernel.tables, strict=True)
        }

    def begin_step(self, now: int, learn_steps: bool = False) -> None:
        """Set the time that rows of the coming training step are touched with, in seconds.

        learn_steps: the step has a second pass (`second_pass`) in which step sizes are learned. Rows are stored
        at its end; what the first pass leaves between the two is kept in float32 for the rows of the batch.
        """
        for kernel in self.collection.kernels():
            kernel.now = now
            kernel.phase = Pass.FIRST if learn_steps else Pass.ONLY

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Forward and backward in this block are the second pass of a step, on the batch of the first.

        A look-up gives the updated rows as they would be stored; gradients go to the step sizes alone.
        """
        self._second = True
        for kernel in self.collection.kernels():
            kernel.phase = Pass.SECOND
        yield
        self._second = False
        for kernel in self.collection.kernels():
            kernel.phase = Pass.ONLY

    def expire(self, now: int) -> None:
        """Give up rows not seen for their table's TTL; scans a part of each table, the next part the next time."""
        for table in self.owned().values():
            if table.config.ttl_seconds is not None:
                table.expire(now, budget_rows=EXPIRE_ROWS)

    def stats(self) -> dict[str, dict[str, float]]:
        """This rank's counts by table: rows, bytes, new, admitted, rejected, expired, evicted."""
        return {name: table.stats() for name, table in self.owned().items()}

    def tensors(self) -> dict[str, Any]:
        """For torch.distributed.checkpoint. Rows of ids are saved by id, see `distributed/checkpoint_tables.py`."""
        return {} if self.others is None else {"tables/others": self.others.detach()}

    def clear(self) -> None:
        """Forget all rows."""
        for kernel in self.collection.kernels():
            kernel.clear()

    @torch.no_grad()
    def _distinct(self, ids: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor]:
        """The distinct ids per table, mixed, with their counts; and for each value of `ids` its place among them."""
        values, bounds = ids.values(), ids.offset_per_key()
        index = torch.empty_like(values)
        distinct, counts, lengths, first = [], [], [], 0
        for fields in self._fields:
            spans = [slice(bounds[field], bounds[field + 1]) for field in fields]
            one = values[spans[0]] if len(spans) == 1 else torch.cat([values[span] for span in spans])
            unique, inverse, count = unique_inverse(one)
            inverse += first
            begin = 0
            for span in spans:
                width = span.stop - span.start
                index[span] = inverse[begin : begin + width]
                begin += width
            distinct.append(unique)
            counts.append(count)
            lengths.append(unique.numel())
            first += unique.numel()
        asked = KeyedJaggedTensor(
            keys=self._names,
            values=mix64(torch.cat(distinct)),
            # Counts ride along as weights. float32 holds them exactly up to 2^24 of one id in one batch.
            weights=torch.cat(counts).float(),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=values.device),
            stride=1,
        )
        return asked, index

    def _pool(self, rows: Tensor, index: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        """Sum or mean over each bag. rows: [distinct, width]; index: [values]. Returns [fields * B, width]."""
        bags, weights = ids.lengths().numel(), ids.weights_or_none()
        if weights is None and not self._averaged and index.numel() == bags and bool((ids.lengths() == 1).all()):
            return F.embedding(index, rows)  # every bag holds one id: nothing to pool
        offsets = ids.offsets().long()
        pooled = F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
        if not self._averaged:
            return pooled
        lengths_fb = ids.lengths().view(self._field_count, -1)
        scale_fb = torch.ones_like(lengths_fb, dtype=torch.float32)
        scale_fb[self._averaged] = 1.0 / lengths_fb[self._averaged].clamp_min(1)
        return pooled * scale_fb.view(-1, 1)
