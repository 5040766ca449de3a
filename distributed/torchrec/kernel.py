"""The compute kernel that torchrec runs on the owner of rows: dynamic tables instead of fbgemm's static ones.

It receives, per table, the ids that every rank asks for with their counts, and gives their rows; in the backward pass
it receives the rows' gradients and updates the tables at once, so that no gradient leaves it.

A step that learns scales (ALPT) has two such passes over one batch. The first updates the optimizer's state and
keeps the new rows of the batch in float32; the second gives them as they would be stored, and its gradients update
the scales, with which the rows are stored.

Where the asking side has a learned row for ids without a row of their own, answers have one column more: 1 for such an
id, 0 for the others. Both are exact in half precision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule

from tessera.distributed.event_times import ages_at, latest, unpacked
from tessera.distributed.host_manager import HostManager
from tessera.distributed.id_exchange import ReceivedIds
from tessera.distributed.module_names import module_name
from tessera.distributed.projections import columns_in
from tessera.embedding.alpt import TwoPassUpdate
from tessera.embedding.cached_table import CachedTable, make_table
from tessera.embedding.errors import CacheFull, TableFull
from tessera.embedding.row_cache import CachedRows
from tessera.embedding.table import DynamicTable
from tessera.kernels.mix import unmix64
from tessera.kernels.unique import unique_inverse


class Pass(Enum):
    """Role of the next forward and backward in a training step: the only pass, or the first or second of two."""

    ONLY = auto()
    FIRST = auto()
    SECOND = auto()


@dataclass
class FoundRows:
    """A table's rows of one batch. rows: int64 [u], their numbers in `where`, which the step reads and updates; ids:
    int64 [u]; inverse: int64 [n], None if no id was asked for twice."""

    where: DynamicTable | CachedRows
    rows: Tensor
    ids: Tensor
    inverse: Tensor | None


class Counted(NamedTuple):
    """Counts of a table at some moment: its `stats`, and the totals of its cache if it has one."""

    stats: dict[str, float]
    cache: dict[str, int] | None

    @classmethod
    def of(cls, table: DynamicTable) -> Counted:
        return cls(table.stats(), dict(table.cache.total) if isinstance(table, CachedTable) else None)


@dataclass
class Request:
    """Look-ups of one batch in all tables of a kernel. mixed: int64 [n], those of table t from bounds[t] on; counts:
    [n]; times: int64 [n], of the latest event of each id, None: that of the batch.
    places: int64, for each id of a bag its place in mixed, with the pooled output dist. order: int64 [n], where each
    look-up stood among those that came, None: there. found: by table, once the ids
    are looked up; counted: by table at that moment, for a batch that is prefetched."""

    mixed: Tensor
    counts: Tensor
    times: Tensor | None
    bounds: list[int]
    places: Tensor | None = None
    order: Tensor | None = None
    found: list[FoundRows] | None = None
    counted: list[Counted] | None = None


class RowLearningRates(FusedOptimizer):
    """Carries the learning rates of the tables where torchrec looks for them, a group for each; `initial_lr` is the one
    that schedules scale. Rows move in the backward pass only."""

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__({}, {}, [{"params": [], "lr": lr, "initial_lr": lr} for lr in rates])

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = False) -> None:
        pass

    def step(self, closure: Any = None) -> None:
        pass


class DynamicTableKernel(BaseBatchedEmbedding[Tensor], FusedOptimizerModule):
    """The parts of all dynamic tables of one model that this rank owns.

    Attributes:
        tables: in the order of torchrec's grouped config.
        now: time of the batch in seconds, set by the caller before each training step, as phase is.
    """

    def __init__(self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None):
        super().__init__(config, pg, device)
        fused = config.fused_params or {}
        configs = {module_name(table.name): table for table in fused["table_configs"]}
        self.names = self._names_of_tables(config)
        self._device_of_rows = torch.device("cpu") if device is None else device
        self.tables = [make_table(configs[name], self._device_of_rows) for name in self.names]
        self.repeats = pg is not None and pg.size() > 1  # each rank sends an id once; two ranks may send the same one
        self._rank = pg.rank() if pg is not None and pg.size() > 1 else None
        self.tells_missing = fused["tells_missing"]
        #: Of each table: where its columns lie in an answer, None if it has all of them.
        dims = dict(fused["dims"])
        places = [columns_in(table.config, dims) for table in self.tables]
        self._columns = [None if one is None else one.to(self._device_of_rows) for one in places]
        self._width = sum(dims.values())
        self._prefetched: deque[Callable[[], Request]] = deque()
        self._counted: list[Counted] = []
        self.now = 0
        self.phase = Pass.ONLY
        # Per table, between the two passes: the rows, their numbers and the inverse.
        self._updates: list[tuple[TwoPassUpdate, Tensor, Tensor | None]] = []
        self._optim = RowLearningRates([table.config.optimizer.lr for table in self.tables])
        # Autograd runs a function's backward only if some input wants a gradient, and it does not track rows.
        self._handle = torch.zeros((), requires_grad=True)
        for table in config.embedding_tables:
            placeholder = nn.Parameter(torch.empty(0, table.local_cols))
            setattr(placeholder, "_in_backward_optimizers", [EmptyFusedOptimizer()])  # noqa: B010, torchrec reads it
            self._param_per_table[table.name] = placeholder

    def _names_of_tables(self, config: GroupedEmbeddingConfig) -> list[str]:
        """Return the names of the tables, as torch's modules know them; torchrec knows them as one."""
        assert config.fused_params is not None
        return list(config.fused_params["row_tables"])

    def forward(self, features: Any) -> Tensor:
        """Return the rows asked for, [n, width], in the order in which ids came. features: `ReceivedIds`, whose kinds
        are the tables, with counts and times `packed`."""
        return self.rows(self.next_request(features))

    def prefetch_rows(self, features: Any, now: int, manager: HostManager) -> None:
        """Let the thread look up the ids of a coming training batch and bring its rows. Steps take what was brought in
        the order of these calls, each with the features that it has been given."""

        def work() -> Request:
            request = self.request(features)
            request.found = self.find(request, now)
            request.counted = [Counted.of(table) for table in self.tables]
            return request

        for table in self._cached():
            table.prefetched += 1
        future = manager.submit(work)
        self._prefetched.append(lambda: manager.result(future))

    def next_request(self, features: Any) -> Request:
        """Return the request of a batch: the prefetched one, if there is one and it is for this step."""
        if not (self._prefetched and self.training) or self.phase is Pass.SECOND:
            return self.request(features)
        request = self._prefetched.popleft()()
        for table in self._cached():
            table.prefetched -= 1
        assert request.counted is not None
        self._counted = request.counted
        return request

    def _cached(self) -> list[CachedTable]:
        return [table for table in self.tables if isinstance(table, CachedTable)]

    def counted(self) -> list[Counted]:
        """Return the counts of the tables up to the current or last step; a batch that is prefetched does not count
        yet."""
        return self._counted if self._prefetched else [Counted.of(table) for table in self.tables]

    def request(self, features: Any) -> Request:
        """Return the look-ups of a batch."""
        assert isinstance(features, ReceivedIds)
        counts, times = unpacked(features.columns[0])
        return Request(features.ids, counts, times, features.bounds, order=features.order)

    def rows(self, request: Request) -> Tensor:
        """Return the rows asked for, [n, width], differentiable."""
        rows: Tensor = _LookUp.apply(self._handle, self, request)  # type: ignore[no-untyped-call]
        return rows

    def find(self, request: Request, now: int) -> list[FoundRows]:
        """Look the ids of a batch up in all tables, in training with all that this changes."""
        found, bounds = [], request.bounds
        ids_of_all, counts_of_all = unmix64(request.mixed), request.counts
        seen_of_all = None if request.times is None else now - ages_at(now, request.times)
        for table, begin, end in zip(self.tables, bounds, bounds[1:], strict=False):
            ids, counts, inverse = ids_of_all[begin:end], counts_of_all[begin:end], None
            seen = now if seen_of_all is None else seen_of_all[begin:end]
            if self.repeats:
                ids, inverse, _ = unique_inverse(ids)
                counts = torch.zeros_like(ids).index_add_(0, inverse, counts)
                seen = latest(seen, inverse, ids.numel()) if isinstance(seen, Tensor) else seen
            found.append(FoundRows(*self._rows_of(table, ids, counts, seen), ids, inverse))
        return found

    def _rows_of(
        self, table: DynamicTable, ids: Tensor, counts: Tensor, now: int | Tensor
    ) -> tuple[DynamicTable | CachedRows, Tensor]:
        try:
            if not isinstance(table, CachedTable):
                return table, table.lookup(ids, now, counts, training=self.training)
            if self.training:
                return table.bring(ids, now, counts)
            return table, table.lookup(ids.to(table.device), 0, training=False)
        except (TableFull, CacheFull) as error:
            if self._rank is None:
                raise
            # A limit is that of each rank's part, and parts fill up at different times.
            raise type(error)(f"rank {self._rank}: {error}") from None

    def look_up(self, request: Request) -> Tensor:
        """Return the rows of all tables in the order in which they were asked for: those of the request, or in a second
        pass those of the first."""
        if self.phase is Pass.SECOND and self.training:
            updates = zip(self._updates, self._columns, strict=True)
            parts = [self._answer(u.gather(inv), rows, inv, columns) for (u, rows, inv), columns in updates]
        else:
            if request.found is None:
                request.found = self.find(request, self.now)
            found = zip(request.found, self._columns, strict=True)
            parts = [self._answer(self._values(f), f.rows, f.inverse, columns) for f, columns in found]
        if request.order is None:
            return torch.cat(parts)
        answer = parts[0].new_empty((request.order.numel(), parts[0].shape[1]))
        spans = pairwise(request.bounds)
        for part, (begin, end) in zip(parts, spans, strict=True):
            answer.index_copy_(0, request.order[begin:end], part)
        return answer

    def _values(self, found: FoundRows) -> Tensor:
        if found.rows.device == found.ids.device:
            return found.where.gather(found.rows, found.inverse)
        # The table is on the host, and outside of training nothing is brought to its cache.
        values = found.where.gather(found.rows).to(found.ids.device)
        return values if found.inverse is None else values[found.inverse]

    def _answer(self, values: Tensor, rows: Tensor, inverse: Tensor | None, columns: Tensor | None) -> Tensor:
        if columns is not None:
            # torchrec sends rows of one width alone. Zeros stand where a narrow table has no columns.
            values = values.new_zeros((values.shape[0], self._width)).index_copy_(1, columns, values)
        if not self.tells_missing:
            return values
        missing = (rows < 0).unsqueeze(1).to(values)
        return torch.cat([values, missing if inverse is None else missing[inverse]], 1)

    def update(self, grads: Tensor, request: Request) -> None:
        if self.tells_missing:
            grads = grads[:, :-1]
        grads = grads.contiguous() if request.order is None else grads[request.order]
        spans = zip(request.bounds, request.bounds[1:], self._columns, strict=False)
        parts = [_cut(grads[begin:end], columns) for begin, end, columns in spans]
        if self.phase is Pass.SECOND:
            for (update, _, inverse), part in zip(self._updates, parts, strict=True):
                update.learn(part, inverse)
            self._updates = []
            return
        assert request.found is not None
        for found, part, lr in zip(request.found, parts, self._optim.rates, strict=True):
            rows, inverse = found.rows, found.inverse
            if self.phase is Pass.FIRST:
                self._updates.append((found.where.begin_update(rows, part, inverse, lr, found.ids), rows, inverse))
            elif part.numel():
                found.where.update(rows, part, inverse, lr, found.ids)

    def end_second_pass(self) -> None:
        """Go back to steps of one pass. Rows that a failed pass has not stored keep the values that they had."""
        self.phase = Pass.ONLY
        self._updates = []

    def clear(self) -> None:
        """Forget all rows."""
        self.tables = [make_table(table.config, self._device_of_rows) for table in self.tables]

    # The methods that torchrec requires of a kernel.

    @property
    def emb_module(self) -> DynamicTableKernel:
        return self

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        return self._optim

    def split_embedding_weights(self) -> list[Tensor]:
        return [self._param_per_table[table.name] for table in self._config.embedding_tables]

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from ()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ()

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return an empty state: `distributed/saved/row_files.py` saves rows, by id, so that any number of ranks can
        load them."""
        return destination if destination is not None else {}


def _cut(grads: Tensor, columns: Tensor | None) -> Tensor:
    """Return the gradients of the columns that a table has."""
    return grads if columns is None else grads.index_select(1, columns)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, kernel: DynamicTableKernel, request: Request) -> Tensor:
        ctx.kernel, ctx.request = kernel, request
        return kernel.look_up(request)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[None, None, None]:
        ctx.kernel.update(grads, ctx.request)
        return None, None, None
