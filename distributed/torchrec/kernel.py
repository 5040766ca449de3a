"""The compute kernel that torchrec runs on the owner of rows: dynamic tables instead of fbgemm's static ones.

It receives, per table, the ids that every rank asks for with their counts, and gives their rows; in the backward pass
it receives the rows' gradients and updates the tables at once, so that no gradient leaves it. Tables of one layout are
one set, looked up and updated by one call each, whatever their number (`parts.py`).

A step that learns scales (ALPT) has two such passes over one batch. The first updates the optimizer's state and
keeps the new rows of the batch in float32; the second gives them as they would be stored, and its gradients update
the scales, with which the rows are stored. In a step of Helen (`embedding/helen.py`) the first pass leaves rows and
optimizer as they are and keeps gradients; the second answers with perturbed rows, and its gradients update them.

Where the asking side has a learned row for ids without a row of their own, answers have one column more: 1 for such an
id, 0 for the others. Both are exact in half precision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule

from tessera.distributed.event_times import ages_at, unpacked
from tessera.distributed.host_manager import HostManager
from tessera.distributed.id_exchange import ReceivedIds
from tessera.distributed.module_names import module_name
from tessera.distributed.projections import columns_in
from tessera.distributed.torchrec.parts import (
    Answers,
    CachedPart,
    Found,
    LookUps,
    Part,
    SetPart,
    numbers_of_sets,
)
from tessera.distributed.window import WHOLE
from tessera.embedding.cached_table import CachedTable
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.errors import CacheFull, TableFull
from tessera.embedding.helen import Perturbation
from tessera.embedding.set_table import SetTable
from tessera.kernels.autograd import apply
from tessera.kernels.host_numbers import on_device
from tessera.kernels.mix import unmix64


class Pass(Enum):
    """Role of the next forward and backward in a training step: the only pass; the first or second of two that learn
    scales; or the first of two that measures gradients, and the second that reads perturbed rows."""

    ONLY = auto()
    FIRST = auto()
    SECOND = auto()
    MEASURING = auto()
    PERTURBED = auto()

    @property
    def is_second(self) -> bool:
        return self in (Pass.SECOND, Pass.PERTURBED)


class Counted(NamedTuple):
    """Counts of a table at some moment: its `stats`, and the totals of its cache if it has one."""

    stats: dict[str, float]
    cache: dict[str, int] | None

    @classmethod
    def of(cls, table: SetTable | CachedTable) -> Counted:
        return cls(table.stats(), dict(table.cache.total) if isinstance(table, CachedTable) else None)


@dataclass
class Request:
    """Look-ups of one batch in all tables of a kernel. mixed: int64 [n], those of table t from bounds[t] on; counts:
    [n], int64 or int32; times: int64 [n], of the latest event of each id, None: that of the batch;
    bounds: int64 [T + 1]. places: int64, for each id of a bag its place in mixed, with the pooled output dist. order:
    int64 [n], where each look-up stood among those that came, None: there. found: by part of the kernel, once the ids
    are looked up; at: for each part, where its look-ups stood; counted: by table at that moment, for a batch that is
    prefetched."""

    mixed: Tensor
    counts: Tensor
    times: Tensor | None
    bounds: Tensor
    places: Tensor | None = None
    order: Tensor | None = None
    found: list[Found] | None = None
    at: list[Tensor] | None = None
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
        tables: in the order of torchrec's grouped config, each as one that can be asked by itself.
        now: time of the batch in seconds, set by the caller before each training step, as phase and window are.
    """

    def __init__(self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None):
        super().__init__(config, pg, device)
        fused = config.fused_params or {}
        configs = {module_name(table.name): table for table in fused["table_configs"]}
        self.names = self._names_of_tables(config)
        self._device_of_rows = torch.device("cpu") if device is None else device
        self._configs = [configs[name] for name in self.names]
        self.repeats = pg is not None and pg.size() > 1  # each rank sends an id once; two ranks may send the same one
        self._rank = pg.rank() if pg is not None and pg.size() > 1 else None
        self.tells_missing = fused["tells_missing"]
        self._dims = dict(fused["dims"])
        self.clear()
        self._prefetched: deque[Callable[[], Request]] = deque()
        self._counted: list[Counted] = []
        self.now = 0
        self.phase = Pass.ONLY
        self.window = WHOLE
        self._first: Request | None = None  # between the two passes
        self._optim = RowLearningRates([table.optimizer.lr for table in self._configs])
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
        if not (self._prefetched and self.training) or self.phase.is_second:
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
        rows: Tensor = apply(_LookUp, self._handle, self, request)
        return rows

    def find(self, request: Request, now: int) -> list[Found]:
        """Look the ids of a batch up in all tables, in training with all that this changes."""
        merges = self._is_one_set and self.repeats  # which then undoes the mixing, too
        ids, counts = request.mixed, request.counts
        if not merges:
            ids, counts = unmix64(ids), counts.long()
        seen = now if request.times is None else now - ages_at(now, request.times)
        whole = LookUps(ids, counts, seen, request.bounds, request.order, self.repeats, mixed=merges)
        try:
            if self._is_one_set:
                return [self.parts[0].find(whole, training=self.training)]
            spans = [span_of(request.bounds, part.numbers) for part in self.parts]
            request.at = [at if request.order is None else request.order[at] for at, _ in spans]
            parts = zip(self.parts, spans, strict=True)
            return [part.find(whole.of(at, bounds), training=self.training) for part, (at, bounds) in parts]
        except (TableFull, CacheFull) as error:
            if self._rank is None:
                raise
            # A limit is that of each rank's part, and parts fill up at different times.
            raise type(error)(f"rank {self._rank}: {error}") from None

    def look_up(self, request: Request) -> Tensor:
        """Return the rows of all tables in the order in which they were asked for: those of the request, or in a second
        pass those of the first."""
        phase = self.phase if self.training else Pass.ONLY
        if phase.is_second:
            assert self._first is not None, "no first pass"
            request = self._first
        if request.found is None:
            request.found = self.find(request, self.now)
        parts: list[tuple[Any, Any]] = list(zip(self.parts, request.found, strict=True))
        answers: list[Tensor] = [_answers_of(part, found, phase) for part, found in parts]
        if request.at is None:
            return answers[0]
        whole = answers[0].new_zeros((request.mixed.numel(), answers[0].shape[1]))
        for at, answer in zip(request.at, answers, strict=True):
            whole.index_copy_(0, at, answer)
        return whole

    def update(self, grads: Tensor, request: Request) -> None:
        """Train rows by the gradients of what `look_up` gave, in this pass or the first."""
        phase = self.phase
        request = self._first if phase.is_second and self._first is not None else request
        self._first = request if phase in (Pass.FIRST, Pass.MEASURING) else None
        assert request.found is not None
        pieces = [grads] if request.at is None else [grads[at] for at in request.at]
        parts: list[tuple[Any, Any, Tensor]] = list(zip(self.parts, request.found, pieces, strict=True))
        for part, found, piece in parts:
            if phase is Pass.SECOND:
                part.learn(piece, found)
                continue
            if phase is Pass.MEASURING:
                part.measure(piece, found)
                continue
            rates = [self._optim.rates[number] for number in part.numbers]
            if phase is Pass.FIRST:
                part.begin_update(piece, found, rates)
            elif self.window.keeps:
                part.keep(piece, found)
            else:
                part.update(piece, found, rates, self.window.factor)

    def perturbations(self) -> list[Perturbation]:
        """Return those that the first pass has measured gradients for, of the rows of each part."""
        made = [part.perturbation for part in self.parts if isinstance(part, SetPart)]
        return [one for one in made if one is not None]

    def begin_second_pass(self) -> None:
        """Go on from the first pass of a step to the second."""
        self.phase = Pass.PERTURBED if self.phase is Pass.MEASURING else Pass.SECOND

    def end_second_pass(self) -> None:
        """Go back to steps of one pass. Rows that a failed pass has not stored keep the values that they had."""
        self.phase, self._first = Pass.ONLY, None
        for part in self.parts:
            part.end_second_pass()

    def clear(self) -> None:
        """Forget all rows."""
        device, self.parts = self._device_of_rows, list[Part]()
        for numbers in numbers_of_sets(self._configs):
            of_set = [self._configs[number] for number in numbers]
            self.parts.append(SetPart(of_set, numbers, self._answers_of(of_set[0]), device))
        for number, config in enumerate(self._configs):
            if config.cache_limit is not None:
                self.parts.append(CachedPart(CachedTable(config, device), number, self._answers_of(config)))
        of_number = {n: table for part in self.parts for n, table in zip(part.numbers, part.tables, strict=True)}
        self.tables = [of_number[number] for number in range(len(self._configs))]
        self._is_one_set = len(self.parts) == 1 and isinstance(self.parts[0], SetPart)

    def _answers_of(self, config: DynamicTableConfig) -> Answers:
        columns = columns_in(config, self._dims)
        columns = None if columns is None else columns.to(self._device_of_rows)
        return Answers(columns, sum(self._dims.values()), tells_missing=self.tells_missing)

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


def _answers_of(part: Any, found: Any, phase: Pass) -> Tensor:
    answers: Tensor
    if phase is Pass.PERTURBED:
        answers = part.perturbed_answers(found)
    else:
        answers = part.second_answers(found) if phase is Pass.SECOND else part.answers(found)
    return answers


def span_of(bounds: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the places of the look-ups of some tables, one table's behind the other's: int64 [k]; and their bounds."""
    ends = bounds.tolist()
    spans = [torch.arange(ends[number], ends[number + 1], device=bounds.device) for number in numbers]
    lengths = accumulate((span.numel() for span in spans), initial=0)
    return torch.cat(spans), on_device(list(lengths), bounds.device)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, kernel: DynamicTableKernel, request: Request) -> Tensor:
        ctx.kernel, ctx.request = kernel, request
        return kernel.look_up(request)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[None, None, None]:
        ctx.kernel.update(grads, ctx.request)
        return None, None, None
