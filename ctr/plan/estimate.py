"""Predict what a training job takes on some number of ranks: bytes of tables, bytes sent, time of a step.

Bytes sent are checked against counted ones; times are estimates from the numbers of `hardware.py` and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tessera.ctr.config import Config
from tessera.ctr.data.lanes import scheduled_rows
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower, fields_of
from tessera.ctr.plan.hardware import Hardware
from tessera.ctr.plan.statistics import Statistics
from tessera.ctr.plan.tower_cost import TowerCost, cost_of
from tessera.ctr.tables import build_tables
from tessera.ctr.train.clock import sent_times
from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.plan import TableSize
from tessera.distributed.traffic import (
    FLOAT32,
    Collective,
    Exchange,
    TableLoad,
    of_dense,
    of_row_norms,
    of_tables,
    repeated,
    ring,
)
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.errors import ConfigError
from tessera.kernels.formats import stored_columns, stored_dtype

LINE = 64  # bytes of a line of the id map
BOUNDS = ("memory", "tower", "host", "latency", "bandwidth")


@dataclass(frozen=True)
class TablePlan:
    """One table over all ranks.

    size: with expected rows. values, state, bookkeeping: bytes of a row. ids: that one rank looks up in a step;
    hottest: share of the rows that hold the most frequent one; distinct: ids that it asks for. owned: ids that one
    owner looks up for all ranks; of_host: distinct ids of all ranks of a host.
    """

    size: TableSize
    values: int
    state: int
    bookkeeping: int
    ids: float
    hottest: float
    distinct: float
    owned: float
    of_host: float


@dataclass(frozen=True)
class RanksPlan:
    """A job on `ranks` ranks. rows: of one rank's batch; ms: milliseconds of a step by what they go to (BOUNDS)."""

    ranks: int
    ranks_per_host: int
    rows: int
    tables: list[TablePlan]
    collectives: list[Collective]
    ms: dict[str, float]
    step_ms: float

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.ranks_per_host)

    @property
    def table_bytes(self) -> float:
        """Bytes of all tables on one rank."""
        return sum(table.size.bytes for table in self.tables) / self.ranks

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in a step."""
        return sum(one.sent for one in self.collectives)

    @property
    def sent_between(self) -> float:
        """Bytes of `sent` that go to other hosts."""
        return sum(one.sent_between(self.ranks, self.ranks_per_host) for one in self.collectives)

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        return max(BOUNDS, key=lambda name: self.ms[name])


class Planner:
    """Plans of one configuration and one data set for any number of ranks.

    samples: rows by whose end tables are to be measured. rows_per_rank: the batch grows with the ranks, instead of the
    one of trainer.batch_size that is shared out.

    Raises ConfigError: static tables, which no plan can be made of.
    """

    def __init__(
        self,
        config: Config,
        schema: Schema,
        statistics: Statistics,
        hardware: Hardware,
        ranks_per_host: int,
        samples: int | None = None,
        rows_per_rank: int | None = None,
    ) -> None:
        if config.embedding.kind == "static":
            raise ConfigError("embedding.kind is static; tessera plan knows the traffic of dynamic tables alone")
        self.config, self.schema, self.statistics = config, schema, statistics
        self.hardware, self.ranks_per_host, self.rows_per_rank = hardware, ranks_per_host, rows_per_rank
        self.samples = statistics.rows if samples is None else samples
        self.tower = build_tower(config, schema)
        self.cost: TowerCost = cost_of(self.tower, fields_of(config, schema))
        self.of_events = config.embedding.clock == "event" and config.data.schema.time is not None

    def batch(self, ranks: int) -> int:
        """Return the rows of a step over all ranks."""
        return self.rows_per_rank * ranks if self.rows_per_rank else self.config.trainer.batch_size

    def plan(self, ranks: int) -> RanksPlan:
        """Return the plan for a number of ranks. Raises ConfigError: limits of tables that a batch does not fit, hosts
        of different numbers of ranks that ids shall be merged in."""
        if self._merges_in_hosts(ranks) and ranks % self.ranks_per_host:
            raise ConfigError(
                f"embedding.exchange is by_host; expected a multiple of --ranks-per-host {self.ranks_per_host}"
            )
        batch = self.batch(ranks)
        config = replace(self.config, trainer=replace(self.config.trainer, batch_size=batch))
        tables = build_tables(config, self.schema, self.tower, ranks)
        dynamic = tables if isinstance(tables, DynamicTables) else None
        lanes = max(self.config.data.lanes, ranks)
        rows = int(scheduled_rows(0, batch, lanes, ranks).max())
        plans = [] if dynamic is None else self._tables(dynamic, batch, ranks)
        marks = dynamic is not None and dynamic.oov is not None
        width = dynamic.width + marks if dynamic is not None else 0  # of an answer, whatever its table's dim
        loads = [_load(one, width) for one in plans]
        learned = sum(one.numel() for one in dynamic.dense_parameters().values()) if dynamic is not None else 0
        collectives = self._collectives(loads, ranks, rows, batch, self._second_passes(dynamic), learned)
        ms = self._times(plans, collectives, ranks, batch / ranks)
        return RanksPlan(ranks, self.ranks_per_host, rows, plans, collectives, ms, self._step(ms))

    def _merges_in_hosts(self, ranks: int) -> bool:
        return self.config.embedding.exchange == "by_host" and ranks > self.ranks_per_host

    def _second_passes(self, tables: DynamicTables | None) -> float:
        if self.config.optimizer.helen.rho:
            return 1.0
        every = self.config.embedding.alpt.every
        return 1 / every if tables is not None and tables.learns_scales and every else 0.0

    def _tables(self, tables: DynamicTables, batch: int, ranks: int) -> list[TablePlan]:
        return [
            self._table(table, size, batch, ranks) for table, size in zip(tables.tables, tables.sizes(), strict=True)
        ]

    def _table(self, table: DynamicTableConfig, size: TableSize, batch: int, ranks: int) -> TablePlan:
        known = self.statistics.tables[table.name]
        rows = round(known.distinct(self.samples))
        if table.row_limit is not None:
            rows = min(rows, table.row_limit * ranks)
        values = sum(stored_columns(g.format, g.dim) * stored_dtype(g.format).itemsize for g in table.groups)
        whole = TableSize(
            size.name, size.features, rows, size.dim, size.row_bytes, size.summed_by_owner, size.cache_rows
        )
        stored = table.stored_bytes
        asked, share = known.distinct(batch / ranks), known.distinct(batch) / ranks
        ids = known.ids * batch / ranks
        of_host = known.distinct(batch * min(1.0, self.ranks_per_host / ranks))
        other, hottest = size.row_bytes - stored, known.in_batch.hottest
        return TablePlan(whole, values, stored - values, other, ids, hottest, asked, share, of_host)

    def _collectives(
        self, loads: Sequence[TableLoad], ranks: int, rows: int, batch: int, second: float, learned: int
    ) -> list[Collective]:
        """Return all messages of a step, the tables' first."""
        if ranks == 1:
            return []
        told = 3 + (sent_times(batch, ranks) if self.of_events else 0)
        transport = self.config.embedding.transport
        each = self.ranks_per_host if self._merges_in_hosts(ranks) else 0
        exchange = Exchange(ranks, rows, transport, self.of_events, self.schema.weighted, told, each)
        found = repeated(of_tables(exchange, loads), second)
        helen = self.config.optimizer.helen
        found += repeated(of_dense(ranks, self.cost.parameters + learned), float(helen.rho > 0 and helen.dense))
        if helen.rho:
            found += of_row_norms(ranks, len(loads), len(self.tower.embedding_dims))
        if self.cost.norms:
            calls, channels = len(self.cost.norms), sum(self.cost.norms)
            statistics = FLOAT32 * (calls + 2 * channels) * (ranks - 1)
            sums = ring(2 * FLOAT32 * channels, ranks)
            of_norms = [
                Collective("batch norm, forward", "all_gather", calls, statistics),
                Collective("batch norm, backward", "all_reduce", calls, sums),
            ]
            found += repeated(of_norms, second)
        return found

    def _times(
        self, tables: Sequence[TablePlan], collectives: Sequence[Collective], ranks: int, rows: float
    ) -> dict[str, float]:
        """Return the milliseconds of a step by what they go to. rows: of one rank."""
        hardware, count = self.hardware, len(tables)
        flops = hardware.flops(tf32=self.config.trainer.tf32, amp=self.config.trainer.amp)
        moved = sum(_moved(table, rows) for table in tables) + 7 * FLOAT32 * self.cost.parameters  # Adam's passes
        host = hardware.step_us + count * (hardware.table_us if ranks == 1 else hardware.table_many_us)
        host += hardware.rank_us * (ranks if ranks > 1 else 0)
        return {
            "memory": moved / (hardware.memory_gb_s * 1e6),
            "tower": 1e3 * self.cost.flops * rows / flops,
            "host": host / 1e3,
            "latency": sum(self._latency_us(one, ranks) for one in collectives) / 1e3,
            "bandwidth": self._bandwidth_ms(collectives, ranks),
        }

    def _step(self, ms: dict[str, float]) -> float:
        compute = ms["memory"] + ms["tower"]
        both = max(compute, ms["host"]) if self.hardware.overlaps else compute + ms["host"]
        return both + ms["latency"] + ms["bandwidth"]

    def _latency_us(self, one: Collective, ranks: int) -> float:
        """Return what a collective takes beside its bytes: a message to each other rank, or around a ring or, of sums
        and gathers between GPUs, up and down a tree."""
        hardware = self.hardware
        inside, outside = one.others(ranks, self.ranks_per_host)
        hop = hardware.between_us if outside else hardware.inside_us
        if one.kind == "all_to_all":
            each = inside * hardware.inside_us + outside * hardware.between_us
        elif one.on_host or not hardware.overlaps:
            each = 2 * (ranks - 1) * (hardware.host_us if one.on_host else hop)
        else:
            each = 2 * (ranks - 1).bit_length() * (hop + hardware.call_us / 5)
        return one.calls * (hardware.call_us + each)

    def _bandwidth_ms(self, collectives: Sequence[Collective], ranks: int) -> float:
        """Return how long bytes take that go to all others alike; inside and between hosts at the same time."""
        sent = sum(one.sent for one in collectives)
        between = sum(one.sent_between(ranks, self.ranks_per_host) for one in collectives)
        hardware = self.hardware
        return max((sent - between) / hardware.inside_gb_s, between / hardware.between_gb_s) / 1e6


def _load(table: TablePlan, columns: int) -> TableLoad:
    size = table.size
    pooled = size.summed_by_owner
    return TableLoad(size.name, columns, len(size.features), table.ids, table.distinct, pooled, table.of_host)


def _moved(table: TablePlan, rows: float) -> float:
    """Return the bytes of memory that one rank reads and writes for a table in a step: ids, lines of the id map, rows
    read for the answer, read and written by the update, and answers and gradients as they are pooled."""
    answer = FLOAT32 * table.size.dim
    owner = table.owned * (2 * LINE + 3 * (table.values + table.state) + 2 * table.bookkeeping)
    asker = table.ids * (4 * 8 + answer) + table.distinct * 4 * answer + rows * len(table.size.features) * 4 * answer
    return owner + asker
