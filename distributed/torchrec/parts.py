"""The tables behind a kernel, in parts that are looked up and updated at once: sets of tables of one layout, and tables
with a cache one by one.

A part gives answers and takes gradients for the look-ups of its tables: flat, one table's behind the other's, unless
`LookUps.order` says where each stood when they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.distributed.event_times import latest
from tessera.embedding.alpt import TwoPassUpdate
from tessera.embedding.cached_table import CachedTable
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.helen import Perturbation
from tessera.embedding.row_cache import CachedRows
from tessera.embedding.set_layout import layout_key
from tessera.embedding.set_table import SetTable
from tessera.embedding.set_update import RecordsUpdate
from tessera.embedding.table_set import TableSet
from tessera.kernels.host_numbers import on_device
from tessera.kernels.pool import sum_by_row
from tessera.kernels.records import Positions
from tessera.kernels.unique import merge_look_ups, positions_of, unique_inverse


class LookUps(NamedTuple):
    """Look-ups of one batch in the tables of a part. ids: int64 [n]; counts: int64 or int32 [n]; seen: the time of
    each, in seconds, one number or int64 [n]; bounds: int64 [T + 1], those of table t from bounds[t] on, behind them
    no look-ups; order:
    int64 [n], the place of each among those that came, None: the same. repeats: whether an id may be there twice;
    mixed: whether ids are mixed, as they may be where they repeat."""

    ids: Tensor
    counts: Tensor
    seen: int | Tensor
    bounds: Tensor
    order: Tensor | None
    repeats: bool
    mixed: bool = False

    def of(self, places: Tensor, bounds: Tensor) -> LookUps:
        """Return those at places (int64 [k]), of tables with these bounds, each where it is."""
        seen = self.seen[places] if isinstance(self.seen, Tensor) else self.seen
        return LookUps(self.ids[places], self.counts[places], seen, bounds, None, self.repeats)


class Answers:
    """What the asking side wants of a row: `width` columns, of which a narrow table has those at `columns` (None: all),
    and with tells_missing one more, 1 for an id that has no row."""

    def __init__(self, columns: Tensor | None, width: int, *, tells_missing: bool) -> None:
        self._columns, self._width, self._tells_missing = columns, width, tells_missing

    def made_of(self, values: Tensor, rows: Tensor, inverse: Tensor | None) -> Tensor:
        """Return answers [n, width or one more] of values [n, own columns]; rows: int64 [u], -1 for none; inverse:
        int64 [n], or None."""
        if self._columns is not None:
            # torchrec sends rows of one width alone. Zeros stand where a narrow table has no columns.
            values = values.new_zeros((len(values), self._width)).index_copy_(1, self._columns, values)
        if not self._tells_missing:
            return values
        missing = (rows < 0).unsqueeze(1).to(values)
        return torch.cat([values, missing if inverse is None else missing[inverse]], 1)

    def gradients_of(self, grads: Tensor) -> Tensor:
        """Return the gradients of a table's own columns, [n, own columns]."""
        if self._columns is not None:
            return grads.index_select(1, self._columns)
        return grads[:, :-1].contiguous() if self._tells_missing else grads.contiguous()


@dataclass
class FoundInSet:
    """rows: int64 [u] of the distinct ids of all tables, those of table t from bounds[t] on. inverse: int64 [n], the
    place in `rows` of each look-up, in the order in which it came; counts: int64 [u], how many look-ups are of each
    row; both None where no id is there twice. often: int64 [u], in training how often the global batch has each id."""

    rows: Tensor
    bounds: Tensor
    inverse: Tensor | None
    counts: Tensor | None
    asked: LookUps
    often: Tensor


class Kept(NamedTuple):
    """What one batch of a step leaves for its last one. rows: int64 [u], -1 for none; grads: float32 [u, width];
    ids: int64 [u], None where no row can be given up before the step ends."""

    rows: Tensor
    grads: Tensor
    ids: Tensor | None


class SetPart:
    """numbers: of the tables among those of the kernel. perturbation: of the rows of a batch, between two passes."""

    def __init__(
        self, configs: Sequence[DynamicTableConfig], numbers: Sequence[int], answers: Answers, device: torch.device
    ) -> None:
        self.set, self.numbers, self._answers = TableSet(configs, device), tuple(numbers), answers
        self.tables: list[SetTable | CachedTable] = [SetTable(self.set, number) for number in range(len(configs))]
        self._update: RecordsUpdate | None = None
        self._rates: tuple[float, ...] = ()
        self._kept: list[Kept] = []
        self._evicts = any(config.row_limit is not None for config in configs)
        self.perturbation: Perturbation | None = None
        self._dims = [group.dim for group in configs[0].groups]

    def find(self, asked: LookUps, *, training: bool) -> FoundInSet:
        """Look ids up, in training with all that this changes."""
        ids, counts, seen, bounds = asked.ids, asked.counts, asked.seen, asked.bounds
        inverse = times = None
        if asked.repeats:
            given, order = counts if training else None, asked.order
            ids, inverse, times, bounds, counts = merge_look_ups(ids, bounds, given, order, mixed=asked.mixed)
            if training and isinstance(seen, Tensor):
                seen = latest(seen, inverse if order is None else inverse[order], ids.numel())
        if not training:
            return FoundInSet(self.set.find(ids, bounds), bounds, inverse, times, asked, counts)
        rows = self.set.lookup(ids, bounds, seen, counts)
        return FoundInSet(rows, bounds, inverse, times, asked, counts)

    def answers(self, found: FoundInSet) -> Tensor:
        """Return what was asked for, [n, columns], in the order in which it came."""
        return self._answers.made_of(self.set.gather(found.rows, found.inverse), found.rows, found.inverse)

    def update(self, grads: Tensor, found: FoundInSet, rates: Sequence[float], factor: float = 1.0) -> None:
        """Train the rows by the gradients of `answers`, and those of batches before that `keep` has kept, times a
        factor. rates: learning rates of the tables."""
        if self._kept:
            self.keep(grads, found)
            rows, grads, positions = self._of_window()
        else:
            rows, grads, positions = found.rows, self._answers.gradients_of(grads), None
            if found.inverse is not None:
                assert found.counts is not None
                positions = Positions(*positions_of(found.inverse, found.counts))
        grads = grads if factor == 1 else grads * factor
        self.set.update(rows, grads, positions, self._rates_of(rates))

    def keep(self, grads: Tensor, found: FoundInSet) -> None:
        """Keep the gradients of `answers` for the update of the last batch of the step."""
        grads = self._answers.gradients_of(grads)
        if found.inverse is not None:
            grads = sum_by_row(grads, found.inverse, found.rows.numel())
        self._kept.append(Kept(found.rows, grads, self.set.store.ids_of(found.rows) if self._evicts else None))

    def _of_window(self) -> tuple[Tensor, Tensor, Positions]:
        """Return the distinct rows of all kept batches, their gradients, and which belong to each; nothing is kept any
        more. A row that was given up since to make room for another id has no part."""
        kept, self._kept = self._kept, []
        every = torch.cat([one.rows for one in kept])
        if self._evicts:
            ids = torch.cat([one.ids for one in kept if one.ids is not None])
            every = every.masked_fill(self.set.store.ids_of(every) != ids, -1)
        rows, inverse, counts = unique_inverse(every)
        return rows, torch.cat([one.grads for one in kept]), Positions(*positions_of(inverse, counts))

    def _rates_of(self, rates: Sequence[float]) -> Tensor:
        if tuple(rates) != self._rates:
            self._rates = tuple(rates)
            self.set.rates = on_device(rates, self.set.device, torch.float64)
        return self.set.rates

    def measure(self, grads: Tensor, found: FoundInSet) -> None:
        """Keep the gradients of `answers`, by which the rows will be perturbed."""
        grads = self._answers.gradients_of(grads)
        if found.inverse is not None:
            grads = sum_by_row(grads, found.inverse, found.rows.numel())
        self.perturbation = Perturbation(found.rows, found.bounds, grads, found.often, self._dims)

    def perturbed_answers(self, found: FoundInSet) -> Tensor:
        """Return `answers` with the perturbation."""
        assert self.perturbation is not None
        values = self.perturbation.added_to(self.set.gather(found.rows, found.inverse), found.inverse)
        return self._answers.made_of(values, found.rows, found.inverse)

    def begin_update(self, grads: Tensor, found: FoundInSet, rates: Sequence[float]) -> None:
        """Do the first pass of a step that learns scales."""
        self._update = RecordsUpdate(self.set, found.rows, self._answers.gradients_of(grads), found.inverse, rates)

    def second_answers(self, found: FoundInSet) -> Tensor:
        """Return the answers of the second pass: rows as they will be stored."""
        assert self._update is not None
        return self._answers.made_of(self._update.gather(found.inverse), found.rows, found.inverse)

    def learn(self, grads: Tensor, found: FoundInSet) -> None:
        """Do the second pass: learn scales by the gradients of `second_answers`, and store the rows."""
        assert self._update is not None
        self._update.learn(self._answers.gradients_of(grads), found.inverse)
        self._update = None

    def end_second_pass(self) -> None:
        """Forget what the first pass left."""
        self._update = self.perturbation = None


@dataclass
class FoundInCache:
    """rows: int64 [u], their numbers in `where`, which the step reads and updates; inverse: int64 [n], None if no id is
    there twice."""

    where: CachedTable | CachedRows
    rows: Tensor
    ids: Tensor
    inverse: Tensor | None
    asked: LookUps


class CachedPart:
    """A table with a cache. Answers and gradients are flat, whatever the order."""

    def __init__(self, table: CachedTable, number: int, answers: Answers) -> None:
        self.table, self.numbers, self._answers = table, (number,), answers
        self.tables: list[SetTable | CachedTable] = [table]
        self._update: TwoPassUpdate | None = None

    def find(self, asked: LookUps, *, training: bool) -> FoundInCache:
        """Look ids up, in training with all that this changes."""
        ids, counts, seen, inverse = asked.ids, asked.counts, asked.seen, None
        if asked.repeats:
            ids, inverse, _ = unique_inverse(ids)
            counts = torch.zeros_like(ids).index_add_(0, inverse, counts)
            seen = latest(seen, inverse, ids.numel()) if isinstance(seen, Tensor) else seen
        if training:
            where, rows = self.table.bring(ids, seen, counts)
            return FoundInCache(where, rows, ids, inverse, asked)
        rows = self.table.lookup(ids.to(self.table.device), 0, training=False)
        return FoundInCache(self.table, rows, ids, inverse, asked)

    def answers(self, found: FoundInCache) -> Tensor:
        """Return what was asked for, [n, columns]."""
        return self._answers.made_of(self._values(found), found.rows, found.inverse)

    def _values(self, found: FoundInCache) -> Tensor:
        if found.rows.device == found.ids.device:
            return found.where.gather(found.rows, found.inverse)
        # The table is on the host, and outside of training nothing is brought to its cache.
        values = found.where.gather(found.rows).to(found.ids.device)
        return values if found.inverse is None else values[found.inverse]

    def update(self, grads: Tensor, found: FoundInCache, rates: Sequence[float], factor: float = 1.0) -> None:
        """Train the rows by the gradients of `answers`. rates: the learning rate of the table. A batch is a step by
        itself here."""
        assert factor == 1
        if grads.numel():
            grads = self._answers.gradients_of(grads)
            found.where.update(found.rows, grads, found.inverse, rates[0], found.ids)
        else:
            self.table.pass_step(rates[0])

    def begin_update(self, grads: Tensor, found: FoundInCache, rates: Sequence[float]) -> None:
        """Do the first pass of a step that learns scales."""
        grads = self._answers.gradients_of(grads)
        self._update = found.where.begin_update(found.rows, grads, found.inverse, rates[0], found.ids)

    def second_answers(self, found: FoundInCache) -> Tensor:
        """Return the answers of the second pass: rows as they will be stored."""
        assert self._update is not None
        return self._answers.made_of(self._update.gather(found.inverse), found.rows, found.inverse)

    def learn(self, grads: Tensor, found: FoundInCache) -> None:
        """Do the second pass: learn scales by the gradients of `second_answers`, and store the rows."""
        assert self._update is not None
        self._update.learn(self._answers.gradients_of(grads), found.inverse)
        self._update = None

    def end_second_pass(self) -> None:
        """Forget what the first pass left."""
        self._update = None


Part = SetPart | CachedPart
Found = FoundInSet | FoundInCache


def numbers_of_sets(tables: Sequence[DynamicTableConfig]) -> list[list[int]]:
    """Return the numbers of the tables without a cache, those of one layout together."""
    found: dict[object, list[int]] = {}
    for number, table in enumerate(tables):
        if table.cache_limit is None:
            found.setdefault(layout_key(table), []).append(number)
    return list(found.values())
