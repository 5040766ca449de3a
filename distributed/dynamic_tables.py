"""Look up ids in dynamic tables that are sharded over any number of ranks, with the same embeddings for each.

Each rank sends an id once per table and batch, however often it occurs and however many groups of embeddings the tower
wants of it: one row of the table holds the values of all groups (DeepFM: v and w). The owners send rows back, and
repeating, pooling and, in the backward pass, summing over repetitions happen here, where the repetitions are.
Tables of long bags may use the pooled output dist: owners send sums over bags, see `torchrec/bag_sharding.py`.

Ids without a row read zeros or one learned row per table. That row is a dense parameter, a copy on every rank, trained
by the dense optimizer: nearly every batch reads it, with gradients from all ranks, as it reads a weight of the tower.
As a row of the sharded table its owner would be asked for it by all ranks in every step, and an optimizer made for
rare rows would drive it by the sum over thousands of ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from tessera.distributed.collectives import ranks
from tessera.distributed.distinct_ids import ALL_TABLES, FieldsOfTables, distinct_ids
from tessera.distributed.fields import OnDevice, chosen, scale_to_mean
from tessera.distributed.host_manager import CacheStats, HostManager
from tessera.distributed.module_names import module_name
from tessera.distributed.oov_rows import with_oov, with_oov_of_tables
from tessera.distributed.perturbation import perturb
from tessera.distributed.plan import TableSize
from tessera.distributed.projections import Projections, columns_in
from tessera.distributed.sequences import PooledAndKept, pool_or_keep
from tessera.distributed.torchrec.bag_sharding import DynamicBagKernel, DynamicBagSharder
from tessera.distributed.torchrec.bags_exchange import AskedBags
from tessera.distributed.torchrec.codecs import codecs
from tessera.distributed.torchrec.configs import torchrec_config
from tessera.distributed.torchrec.ids_prefetch import IdsPrefetch, PrefetchedBatch
from tessera.distributed.torchrec.kernel import Counted, DynamicTableKernel, Pass
from tessera.distributed.torchrec.row_sharding import DYNAMIC, AskedRows, DynamicSharder
from tessera.distributed.window import WHOLE, Window
from tessera.embedding.cached_table import CachedTable
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.set_table import OwnedTable

EXPIRE_ROWS = 1 << 18  # rows of each table that one call of `expire` looks at: about a millisecond


class DynamicTables(nn.Module):
    """All tables of a model: an EmbeddingCollection and, with a pooled output dist, an EmbeddingBagCollection.

    Args:
        tables: every id feature belongs to exactly one; all have groups of the same names.
        id_names: the id features, in the order in which a group's output lists the fields.
        expected_rows: rows per table that the planner counts with; tables grow beyond it.
        averaged: the features whose bags are averaged over their ids; the others are summed.
        sequences: the features whose rows are not pooled: the tower gets the row of each id.
        transport: precision in which rows travel between ranks, see `torchrec/codecs.py`.
        oov: the OOV row that ids without a row read, zeros or learned per table (`oov` [tables, width], first 0).
        init: values of new rows: random, or oov, the learned OOV row as it is when they are added.
        bag_tables: the tables with a pooled output dist, whose owners send sums over bags.
        timeout_seconds: longest wait of a step for rows that are brought to the caches of tables on the host.
        dims: group -> columns that the tower wants, those of the first table if not given. Tables whose groups have
            fewer are projected, see `projections.py`.
        squares: whether `squares_looked_up` is asked for after forward passes in training.
        by_host: ids are merged inside a host before they leave it, but not those of bag_tables.
    """

    compute_kernel = DYNAMIC.value

    def __init__(
        self,
        tables: Sequence[DynamicTableConfig],
        id_names: Sequence[str],
        expected_rows: int,
        averaged: Collection[str] = (),
        transport: str = "fp32",
        oov: str = "zeros",
        bag_tables: Collection[str] = (),
        init: str = "random",
        timeout_seconds: float = 300.0,
        *,
        dims: Mapping[str, int] | None = None,
        sequences: Collection[str] = (),
        squares: bool = False,
        by_host: bool = False,
    ) -> None:
        super().__init__()
        self.cached = tables[0].cache_limit is not None
        assert all((table.cache_limit is not None) == self.cached for table in tables)
        self._timeout_seconds, self._by_host = timeout_seconds, by_host
        self._manager: HostManager | None = None
        self._prefetched: deque[PrefetchedBatch] = deque()
        self._transport = transport
        self._first: PrefetchedBatch | None = None  # of the pass before, for the second one
        self._two_passes = self._second = self._frozen = False
        self._times: Tensor | None = None  # of the coming step's rows, where it was not begun
        self._keeps_squares = squares
        self._squares: list[Tensor] = []  # of each path, in the last forward pass in training
        self.tables, self.expected_rows = list(tables), expected_rows
        self.groups = dict(dims or {group.name: group.dim for group in tables[0].groups})
        self.width = sum(self.groups.values())  # of the rows that owners answer with
        self._columns = [columns_in(table, self.groups) for table in tables]
        is_mixed = any(columns is not None for columns in self._columns)
        pooled = [name for name in id_names if name not in sequences]
        self._pooled = OnDevice([place for place, name in enumerate(id_names) if name in pooled])
        self.projections = Projections(tables, pooled, self.groups) if is_mixed else None
        self.learns_scales = any(table.learns_scales for table in tables)
        self._init_from_oov = init == "oov"
        # New rows that begin as the learned row cannot be added before the step before has changed it.
        self.prefetches = self.cached and not self._init_from_oov
        assert oov == "learned" or not self._init_from_oov
        self.oov = nn.Parameter(torch.zeros(len(tables), self.width)) if oov == "learned" else None
        self._id_names = list(id_names)
        self._averaged = OnDevice([name in averaged for name in id_names]) if averaged else None
        self._row_tables = [i for i, table in enumerate(tables) if table.name not in bag_tables]
        self._bag_tables = [i for i, table in enumerate(tables) if table.name in bag_tables]
        self._row_numbers = OnDevice(self._row_tables)
        self.collection: Any = None  # torchrec puts a sharded module in its place, as in that of bags
        self.bags: Any = None
        if self._row_tables:
            config = self._torchrec_config(EmbeddingConfig, ALL_TABLES, self._row_tables, [ALL_TABLES])
            self.collection = EmbeddingCollection(device=torch.device("meta"), tables=[config])
        if self._bag_tables:
            configs = [
                self._torchrec_config(EmbeddingBagConfig, module_name(tables[i].name), [i], list(tables[i].features))
                for i in self._bag_tables
            ]
            self.bags = EmbeddingBagCollection(device=torch.device("meta"), tables=configs)
        # Positions in id_names of the fields of each path; `_order` undoes putting one path's behind the other's.
        self._row_fields, self._bag_fields = (
            sorted(self._id_names.index(name) for i in path for name in tables[i].features)
            for path in (self._row_tables, self._bag_tables)
        )
        self._row_sequences = [self._id_names[field] in sequences for field in self._row_fields]
        place = {self._id_names[field]: place for place, field in enumerate(self._row_fields)}
        self._fields_of_tables = FieldsOfTables([[place[n] for n in tables[i].features] for i in self._row_tables])
        table_of = {name: i for i in self._bag_tables for name in tables[i].features}
        self._bags_of = [(self._id_names[field], table_of[self._id_names[field]]) for field in self._bag_fields]
        places = self._pooled.values
        both = [places.index(field) for field in self._row_fields + self._bag_fields if field in places]
        self._order = None if both == sorted(both) else OnDevice([both.index(field) for field in range(len(both))])
        self._rows_of_all, self._bags_of_all = OnDevice(self._row_fields), OnDevice(self._bag_fields)

    def _torchrec_config(self, kind: type, name: str, of: list[int], features: list[str]) -> Any:
        tables, width = [self.tables[i] for i in of], self.width + (self.oov is not None)  # of an answer
        return torchrec_config(kind, name, tables, features, self.expected_rows, width)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return group -> [B, pooled fields, dim] float32, zeros for empty bags, and for each sequence
        `events_key(group, name)` -> [its ids, dim]. ids: raw int64 ids, stride B."""
        if self._second:
            assert self._first is not None, "no first pass"
            batch = self._first  # the owners have its ids
        elif self.training and self._prefetched:
            batch = self._prefetched.popleft()
            assert batch.ids is ids, "another batch was begun for this step"
        else:
            batch = PrefetchedBatch(ids, self._times if self.training else None)
            self._ask(batch)
        self._first = batch if self._two_passes and self.training else None
        paths, events, self._squares = [], dict[str, Tensor](), []
        if self.collection is not None:
            sums, events = self._sums_of_rows(self._on_row_path(ids), batch)
            paths.append(sums)
        if self.bags is not None:
            paths.append(self._sums_of_owners(batch))
        sums = [parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*paths, strict=True)]
        if self._order is not None:
            sums = [sums_bfd[:, self._order.on(sums_bfd.device)] for sums_bfd in sums]
        if self._averaged is not None:
            scale_fb = self._pooled.of(scale_to_mean(ids, self._averaged))
            sums = [sums_bfd * scale_fb.t().unsqueeze(2) for sums_bfd in sums]
        embeddings = dict(zip(self.groups, sums, strict=True))
        return events | (self.projections(embeddings, frozen=self._frozen) if self.projections else embeddings)

    @torch.no_grad()
    def begin(self, ids: KeyedJaggedTensor, times: Tensor | None = None, told: Tensor | None = None) -> PrefetchedBatch:
        """Merge the ids of a coming training batch and begin to send them to their owners. Collective: on all ranks in
        the same place; `bring` follows.

        times: int64 [B] of the events in its rows; told: float64 [n], what this rank tells all others, where `tells`.
        Batches are begun in the order of their steps, whose forward pass takes the same `ids`; the next one at the
        earliest when this step begins. With `prefetches` nothing may be asked of the tables until that step has begun,
        evaluation and saving included. Returns what holds the memory that the step will use.
        """
        assert self.training
        begun = PrefetchedBatch(ids, times)
        self._ask(begun, told)
        self._prefetched.append(begun)
        return begun

    @property
    def tells(self) -> bool:
        """Whether what a rank tells the others travels with its ids: where there are several."""
        return ranks() > 1

    def bring(self, now: int) -> None:
        """With `prefetches` send the ids of the batch that was begun last, and let a thread of each owner bring their
        rows to the device. now: as for `begin_step`. Collective."""
        if not self.prefetches:
            return
        batch = self._prefetched[-1]
        if self._manager is None:
            self._manager = HostManager(batch.ids.values().device, self._timeout_seconds)
        for kernel, features in [one for sent in batch.sent() for one in sent.received()]:
            kernel.prefetch_rows(features, now, self._manager)

    def send_begun(self) -> None:
        """Go on with what `begin` started, as long as the device is busy. Collective."""
        for batch in self._prefetched:
            for sent in batch.sent():
                sent.send()

    def _ask(self, batch: PrefetchedBatch, told: Tensor | None = None) -> None:
        """Begin to send what the batch asks of the owners of rows."""
        if self.collection is not None:
            batch.asked = distinct_ids(self._on_row_path(batch.ids), batch.times, self._fields_of_tables)
            batch.rows, told = IdsPrefetch(self.collection, AskedRows(batch.asked, told)), None
        if self.bags is not None:
            bags = chosen(batch.ids, self._bags_of_all) if self._row_fields else batch.ids
            batch.bags = IdsPrefetch(self.bags, AskedBags(bags, batch.times, told))

    def _on_row_path(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return chosen(ids, self._rows_of_all) if self._bag_fields else ids

    def _sums_of_rows(self, ids: KeyedJaggedTensor, prefetched: PrefetchedBatch) -> PooledAndKept:
        asked, sent = prefetched.asked, prefetched.rows
        assert asked is not None and sent is not None
        rows: Tensor = sent.answer().wait()
        if self.oov is not None:
            rows = with_oov_of_tables(rows, asked.bounds, self._oov_rows(self.oov), self._row_numbers)
        if self._keeps_squares and self.training:
            self._squares.append((rows.square().sum(1) * asked.counts.to(rows)).sum())
        return pool_or_keep(rows, asked.index, ids, self._row_sequences, self.groups)

    def _sums_of_owners(self, prefetched: PrefetchedBatch) -> Sequence[Tensor]:
        """Return [B, fields, dim] by group, for fields with a pooled output dist."""
        assert prefetched.bags is not None
        answered: Any = prefetched.bags.answer()
        if self._keeps_squares and self.training:
            self._squares += [self._squares_of_owner(kernel) for kernel in self.bags.kernels()]
        sums = [self._with_oov(answered[name], table) for name, table in self._bags_of]
        return list(torch.stack(sums, 1).split(list(self.groups.values()), 2))

    def _squares_of_owner(self, kernel: DynamicBagKernel) -> Tensor:
        squares, missing = kernel.squares()
        if self.oov is None:
            return squares
        return squares + (self._oov_rows(self.oov)[self._bag_tables].square().sum(1) * missing).sum()

    def squares_looked_up(self, embeddings: dict[str, Tensor]) -> Tensor:
        """Return the sum of squares of all rows, each as often as the batch looked it up: float32 [], differentiable,
        what L2 per look-up multiplies. `embeddings` are what the forward pass returned.

        With the pooled output dist a rank counts the rows that it owns, for all ranks, and divides by the number of
        ranks, as the row's gradient is on its way there; so only the sum over ranks is of use, not one rank's."""
        return sum(self._squares, torch.zeros(()))

    def _with_oov(self, answered: Tensor, table: int) -> Tensor:
        """Map the owners' answer [n, columns] to [n, width]; ids without a row get the table's OOV row."""
        return answered if self.oov is None else with_oov(answered, self._oov_rows(self.oov)[table])

    def _oov_rows(self, oov: Tensor) -> Tensor:
        # In a second pass for rows alone data parallel, which counts gradients, must not see a second one.
        return oov.detach() if self._frozen else oov

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the dense optimizer by name."""
        of_oov = {} if self.oov is None else {"tables.others": self.oov}  # as saved states name it
        return of_oov | {f"tables.projections.{name}": weight for name, weight in self._projections().items()}

    def _projections(self) -> dict[str, nn.Parameter]:
        return {} if self.projections is None else self.projections.named()

    def sharders(self) -> list[DynamicSharder | DynamicBagSharder]:
        fused = {
            "table_configs": tuple(self.tables),
            "row_tables": tuple(module_name(self.tables[i].name) for i in self._row_tables),
            "dims": tuple(self.groups.items()),
            "tells_missing": self.oov is not None,
            "by_host_seconds": self._timeout_seconds if self._by_host else None,
        }
        registry = codecs(self._transport)
        return [kind(fused, qcomm_codecs_registry=registry) for kind in (DynamicSharder, DynamicBagSharder)]

    def sizes(self) -> list[TableSize]:
        rows = self.expected_rows
        return [
            TableSize(t.name, t.features, rows, t.width, t.bytes_per_row, i in self._bag_tables, t.cache_limit)
            for i, t in enumerate(self.tables)
        ]

    def _kernels(self) -> list[DynamicTableKernel]:
        return [k for module in (self.collection, self.bags) if module is not None for k in module.kernels()]

    def owned(self) -> dict[str, OwnedTable]:
        """Return this rank's part of each table, after sharding."""
        return self._by_table([kernel.tables for kernel in self._kernels()])

    def begin_step(
        self,
        now: int,
        *,
        learn_scales: bool = False,
        perturbs: bool = False,
        times: Tensor | None = None,
        window: Window = WHOLE,
    ) -> None:
        """Set the time of the coming batch, in seconds, with which its rows are touched.

        times: int64 [B], of events in this rank's rows, as many as on others: the latest one of an id on all ranks, at
        most `now`, touches its row. learn_scales: the step has a second pass, for scales; rows are stored at its end.
        perturbs: it has one that reads perturbed rows (`perturb`), whose gradients update them. window: what the batch
        is to its step. Of the three at most one; the last two without a cache."""
        assert not ((perturbs and learn_scales) or ((perturbs or window != WHOLE) and self.cached))
        self._times = None if self._prefetched else times
        self._two_passes = learn_scales or perturbs
        for kernel in self._kernels():
            kernel.now, kernel.window = now, window
            kernel.phase = Pass.FIRST if learn_scales else Pass.MEASURING if perturbs else Pass.ONLY
        if self._init_from_oov and self.oov is not None:
            for table, oov, columns in zip(self.owned().values(), self.oov.detach(), self._columns, strict=True):
                table.init_values = (oov if columns is None else oov[columns.to(oov.device)]).to(table.device)

    def begin_period(self) -> None:
        """Count the rows that exist now as old from here on: the optimizer's `old_rows_factor` slows them."""
        for table in self.owned().values():
            table.begin_period()

    def perturb(self, rho: float, xi: float) -> None:
        """Between two passes perturb the batch's rows by gradients of the first (`embedding/helen.py`). Collective."""
        perturb([one for kernel in self._kernels() for one in kernel.perturbations()], rho, xi)

    @contextmanager
    def second_pass(self, *, dense: bool = False) -> Iterator[None]:
        """Run forward and backward in this block as the second pass of a step, on the batch of the first: look-ups give
        the updated rows as they would be stored, and gradients go to the scales alone; or perturbed rows, which
        gradients update. dense: OOV rows and projections get gradients, too."""
        self._second, self._frozen = True, not dense
        for kernel in self._kernels():
            kernel.begin_second_pass()
        try:
            yield
        finally:
            self._second = self._frozen = False
            for kernel in self._kernels():
                kernel.end_second_pass()

    def expire(self, now: int, *, everywhere: bool = False) -> None:
        """Evict rows not seen for their table's TTL; scan the next part of each table, or (everywhere) all of it."""
        for table in self.owned().values():
            if table.config.ttl_seconds is not None:
                table.expire(now, budget_rows=None if everywhere else EXPIRE_ROWS)

    def stats(self) -> dict[str, dict[str, float]]:
        """Return this rank's counts by table, at any time: a batch that is prefetched counts from its step on."""
        return {name: counted.stats for name, counted in self._counted().items()}

    def _counted(self) -> dict[str, Counted]:
        return self._by_table([kernel.counted() for kernel in self._kernels()])

    def _by_table(self, of_kernels: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Return what the kernels have for each of their tables, by the tables' names and in their order."""
        names = [name for kernel in self._kernels() for name in kernel.names]
        found = dict(zip(names, [one for values in of_kernels for one in values], strict=True))
        return {table.name: found[module_name(table.name)] for table in self.tables}

    def cache_stats(self) -> CacheStats | None:
        """Return this rank's cache counts since the last call, at any time; None if tables have no cache."""
        if not self.cached:
            return None
        counted = self._counted()
        tables = [(name, table) for name, table in self.owned().items() if isinstance(table, CachedTable)]
        stats = CacheStats({name: table.cache_stats(counted[name].cache) for name, table in tables})
        if self._manager is not None:
            stats.waited_seconds, stats.busy_seconds = self._manager.take_seconds()
        return stats

    def tensors(self) -> dict[str, Any]:
        """Return what is saved by name, live. Rows are saved by id, see `distributed/saved/tables.py`."""
        of_oov = {} if self.oov is None else {"tables/others": self.oov.detach()}
        named = self._projections().items()
        return of_oov | {f"tables/projections.{name}.weight": weight.detach() for name, weight in named}

    def clear(self) -> None:
        """Forget all rows."""
        for kernel in self._kernels():
            kernel.clear()

    @torch.no_grad()
    def restart(self) -> None:
        """Reset to the state before the first step."""
        self.clear()
        if self.oov is not None:
            self.oov.zero_()
        if self.projections is not None:
            self.projections.restart()
