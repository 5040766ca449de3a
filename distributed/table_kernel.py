"""The compute kernel that torchrec runs on the owner of rows: dynamic tables instead of fbgemm's static ones.

It receives, per table, the ids that every rank asks for with their counts, and gives their rows; in the backward pass
it receives the rows' gradients and updates the tables at once, so that no gradient leaves it.

A step that learns step sizes (ALPT) has two such passes over one batch. The first updates the optimizer's state and
keeps the new rows of the batch in float32; the second gives them as they would be stored, and its gradients update
the step sizes, with which the rows are stored.

Where the asking side has a learned row for ids without a row of their own, answers have one column more: 1 for such an
id, 0 for the others. Both are exact in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding.alpt import RowsAhead
from embedding.errors import TableFull
from embedding.table import DynamicTable
from kernels.mix import unmix64
from kernels.unique import unique_inverse


class Pass(Enum):
    """What the next forward and backward of a training step are: all of it, or the first or second of two."""

    ONLY = auto()
    FIRST = auto()
    SECOND = auto()


class RowLearningRate(FusedOptimizer):
    """Carries the learning rate of the tables where torchrec looks for it. Rows move in the backward pass only."""

    def __init__(self, lr: float) -> None:
        super().__init__({}, {}, [{"params": [], "lr": lr}])

    @property
    def lr(self) -> float:
        return self.param_groups[0]["lr"]

    def zero_grad(self, set_to_none: bool = False) -> None:
        pass

    def step(self, closure: Any = None) -> None:
        pass


class DynamicTableKernel(BaseBatchedEmbedding[Tensor], FusedOptimizerModule):
    """All dynamic tables of one model, those parts of them that this rank owns.

    Attributes:
        tables: in the order of torchrec's grouped config.
        now: time of the batch in seconds, set by the caller before each training step, as phase is.
    """

    def __init__(self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None):
        super().__init__(config, pg, device)
        fused = config.fused_params or {}
        configs = {table.name: table for table in fused["table_configs"]}
        self.tables = [DynamicTable(configs[table.name], device) for table in config.embedding_tables]
        self.names = [table.name for table in config.embedding_tables]
        self.repeats = pg is not None and pg.size() > 1  # each rank sends an id once; two ranks may send the same one
        self._rank = pg.rank() if pg is not None and pg.size() > 1 else None
        self.tells_missing = fused["tells_missing"]
        self.now = 0
        self.phase = Pass.ONLY
        # Per table, between the two passes: the rows, their numbers and the inverse.
        self._ahead: list[tuple[RowsAhead, Tensor, Tensor | None]] = []
        self._optim = RowLearningRate(fused["learning_rate"])
        # Autograd runs a function's backward only if some input wants a gradient; rows are no tensor it knows of.
        self._handle = torch.zeros((), requires_grad=True)
        for table in config.embedding_tables:
            placeholder = nn.Parameter(torch.empty(0, table.local_cols))
            placeholder._in_backward_optimizers = [EmptyFusedOptimizer()]
            self._param_per_table[table.name] = placeholder

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """features: one key per table, stride = ranks, values mixed ids, weights their counts. Returns [n, width]."""
        offsets = features.offsets()
        stride = (offsets.numel() - 1) // len(self.tables)
        return self.rows(features.values(), features.weights(), offsets[::stride].tolist())

    def rows(self, mixed: Tensor, counts: Tensor, bounds: list[int]) -> Tensor:
        """Rows of ids, differentiable. mixed: int64 [n], those of table t from bounds[t] on; counts: [n]."""
        return _LookUp.apply(self._handle, self, mixed, counts, bounds)

    def look_up(self, mixed: Tensor, counts: Tensor, bounds: list[int]) -> tuple[Tensor, list[tuple]]:
        """Rows of all tables one after the other, and what `update` needs per table: row numbers, ids and inverse."""
        if self.phase is Pass.SECOND and self.training:
            parts = [self._answer(ahead.gather(inverse), rows, inverse) for ahead, rows, inverse in self._ahead]
            return torch.cat(parts), []
        parts, context = [], []
        for table, begin, end in zip(self.tables, bounds, bounds[1:], strict=False):
            ids, count = unmix64(mixed[begin:end]), counts[begin:end].long()
            inverse = None
            if self.repeats:
                ids, inverse, _ = unique_inverse(ids)
                count = torch.zeros_like(ids).index_add_(0, inverse, count)
            rows = self._rows_of(table, ids, count)
            parts.append(self._answer(table.gather(rows, inverse), rows, inverse))
            context.append((rows, ids, inverse))
        return torch.cat(parts), context

    def _rows_of(self, table: DynamicTable, ids: Tensor, counts: Tensor) -> Tensor:
        try:
            return table.lookup(ids, self.now, counts, self.training)
        except TableFull as error:
            if self._rank is None:
                raise
            # A limit is that of each rank's part, and parts fill up at different times.
            raise TableFull(f"rank {self._rank}: {error}") from None

    def _answer(self, values: Tensor, rows: Tensor, inverse: Tensor | None) -> Tensor:
        if not self.tells_missing:
            return values
        missing = (rows < 0).unsqueeze(1).to(values.dtype)
        return torch.cat([values, missing if inverse is None else missing[inverse]], 1)

    def update(self, grads: Tensor, context: list[tuple], bounds: list[int]) -> None:
        lr = self._optim.lr
        if self.tells_missing:
            grads = grads[:, :-1]
        grads = grads.contiguous()
        parts = [grads[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
        if self.phase is Pass.SECOND:
            for (ahead, _, inverse), part in zip(self._ahead, parts, strict=True):
                ahead.learn(part, inverse)
            self._ahead = []
            return
        for table, (rows, ids, inverse), part in zip(self.tables, context, parts, strict=True):
            if self.phase is Pass.FIRST:
                self._ahead.append((table.update_ahead(rows, part, inverse, lr, ids), rows, inverse))
            elif part.numel():
                table.update(rows, part, inverse, lr, ids)

    def clear(self) -> None:
        """Forget all rows."""
        self.tables = [DynamicTable(table.config, table.device) for table in self.tables]

    # What torchrec asks of a kernel.

    @property
    def emb_module(self) -> DynamicTableKernel:
        return self

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        return self._optim

    def split_embedding_weights(self) -> list[Tensor]:
        return [self._param_per_table[name] for name in self.names]

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator:
        yield from ()

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator:
        yield from ()

    def state_dict(self, destination: dict | None = None, prefix: str = "", keep_vars: bool = False) -> dict:
        """Empty: rows are saved by `distributed/table_files.py`, by id, so that any number of ranks can load them."""
        return destination if destination is not None else {}


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, handle: Tensor, kernel: DynamicTableKernel, mixed: Tensor, counts: Tensor, bounds: list[int]):
        rows, ctx.context = kernel.look_up(mixed, counts, bounds)
        ctx.kernel, ctx.bounds = kernel, bounds
        return rows

    @staticmethod
    def backward(ctx, grads: Tensor):
        ctx.kernel.update(grads, ctx.context, ctx.bounds)
        return None, None, None, None, None
