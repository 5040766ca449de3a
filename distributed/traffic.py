"""Count the bytes that one rank sends to the others in a training step, by collective.

The figures follow from what `dynamic_tables.py` and torchrec do, and are held to the bytes that real ranks send by
`tests/ctr/plan/test_counted.py`. What stays on its rank is left out. Owners are balanced, as ids travel mixed, so each
rank sends to each other one alike, and all ranks are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tessera.distributed.message_room import message_bytes
from tessera.distributed.torchrec.codecs import bytes_of_number
from tessera.kernels.message_layout import MessageLayout

ONCE = ("ids", "ids in the host", "ids between hosts", "ids of bags", "agree")
HOST, HOSTS = "host", "hosts"
KINDS = ("all_to_all", "all_gather", "all_reduce")
INT32, INT64, FLOAT32, FLOAT64 = 4, 8, 4, 8
BUCKET, FIRST_BUCKET = 25 << 20, 1 << 20  # of torch's DistributedDataParallel


@dataclass(frozen=True)
class Collective:
    """One kind of message of a step. kind: one of KINDS; calls: per step; sent: bytes of one rank to all others.

    on_host: it goes through the host (gloo) on GPUs, too, and the step waits for it. among: which ranks take part:
    all, those of a host, or one of each host (HOST, HOSTS).
    """

    name: str
    kind: str
    calls: float
    sent: float
    on_host: bool = False
    among: str = "all"

    def others(self, ranks: int, ranks_per_host: int) -> tuple[int, int]:
        """Return how many other ranks take part on the same host, and on other hosts."""
        each = min(ranks, ranks_per_host)
        inside, outside = each - 1, ranks - each
        if self.among == HOST:
            return inside, 0
        return (0, ranks // each - 1) if self.among == HOSTS else (inside, outside)

    def sent_between(self, ranks: int, ranks_per_host: int) -> float:
        """Return the bytes of `sent` that go to other hosts."""
        inside, outside = self.others(ranks, ranks_per_host)
        return self.sent * outside / max(1, inside + outside)


@dataclass(frozen=True)
class TableLoad:
    """What one rank asks of one table in a step. columns: of an answer; features: that are looked up in it.

    ids: all of them; distinct: those that differ, of_host: those of all ranks of a host. pooled: its bags are summed by
    owners, so that all ids travel.
    """

    name: str
    columns: int
    features: int
    ids: float
    distinct: float
    pooled: bool = False
    of_host: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """What is sent is the same for all tables: ranks, precision, and what travels with ids.

    rows: of one rank's batch, padding included. times: of rows' events travel. weights: ids of bags have weights. told:
    numbers that a rank tells all others, with its ids if there are tables. ranks_per_host: where ids are merged inside
    hosts, 0: nowhere.
    """

    ranks: int
    rows: int
    transport: str = "fp32"
    times: bool = False
    weights: bool = False
    told: int = 0
    ranks_per_host: int = 0

    @property
    def others(self) -> int:
        return self.ranks - 1

    def share(self, count: float) -> float:
        """Return how many of `count` evenly owned things belong to other ranks."""
        return count * self.others / self.ranks


def of_tables(exchange: Exchange, tables: Sequence[TableLoad]) -> list[Collective]:
    """Return what the tables send in one forward and backward pass: ids with what travels with them, rows, gradients;
    none on one rank."""
    if exchange.ranks == 1:
        return []
    rows = [table for table in tables if not table.pooled]
    pooled = [table for table in tables if table.pooled]
    found = _of_rows(exchange, rows) if rows else []
    found += _of_pooled(exchange, pooled, is_first=not rows) if pooled else []
    if exchange.told and not found:
        found.append(of_told(exchange))
    return found


def of_told(exchange: Exchange) -> Collective:
    """Return what ranks tell each other where no ids carry it."""
    return Collective("agree", "all_gather", 1, exchange.others * exchange.told * FLOAT64, on_host=True)


def _of_rows(exchange: Exchange, tables: Sequence[TableLoad]) -> list[Collective]:
    distinct = [(table.columns, table.distinct) for table in tables]
    each = exchange.ranks_per_host
    if each in (0, 1, exchange.ranks):
        return _of_stage(exchange, distinct, "", "all")
    of_host = [(table.columns, table.of_host / each) for table in tables]  # each rank brings its part of them
    inside = replace(exchange, ranks=each)
    between = replace(exchange, ranks=exchange.ranks // each, told=exchange.told * each)
    return [
        *_of_stage(inside, distinct, " in the host", HOST),
        *_of_stage(between, of_host, " between hosts", HOSTS),
    ]


def _of_stage(exchange: Exchange, asked: Sequence[tuple[int, float]], where: str, among: str) -> list[Collective]:
    """Return what goes among `exchange.ranks`. asked: of each table the columns of an answer and the ids of a rank."""
    ids = sum(count for _, count in asked)
    values = exchange.share(sum(columns * count for columns, count in asked))
    of_row, of_gradient = bytes_of_number(exchange.transport)
    count = INT64 if exchange.times else INT32  # the time is packed with the count
    message = message_bytes(ids / exchange.ranks, len(asked), exchange.told, [count])
    return [
        Collective("ids" + where, "all_to_all", 1, exchange.others * message, among=among),
        Collective("rows" + where, "all_to_all", 1, values * of_row, among=among),
        Collective("gradients" + where, "all_to_all", 1, values * of_gradient, among=among),
    ]


def _of_pooled(exchange: Exchange, tables: Sequence[TableLoad], *, is_first: bool) -> list[Collective]:
    ids = exchange.share(sum(table.ids for table in tables))
    values = exchange.others * exchange.rows * sum(table.features * table.columns for table in tables)
    of_sum, of_gradient = bytes_of_number(exchange.transport)
    told = 1 + (exchange.told if is_first else 0)  # the rows of a batch
    beside = INT32 + exchange.times * INT64 + exchange.weights * FLOAT32  # an id: its row, time, weight
    headers = exchange.others * MessageLayout(0, sum(table.features for table in tables), told, ()).words * INT64
    return [
        Collective("ids of bags", "all_to_all", 2, headers + ids * (INT64 + beside)),
        Collective("sums of bags", "all_to_all", 1, values * of_sum),
        Collective("gradients of bags", "all_to_all", 1, values * of_gradient),
    ]


def repeated(collectives: Sequence[Collective], share: float) -> list[Collective]:
    """Return the same messages for steps of which a share has a second pass. Some are known from the first one."""
    return [
        one if one.name in ONCE else replace(one, calls=one.calls * (1 + share), sent=one.sent * (1 + share))
        for one in collectives
    ]


def of_dense(ranks: int, parameters: int) -> list[Collective]:
    """Return the sum of the dense gradients over ranks, as a ring sends it. parameters: their number, float32."""
    if ranks == 1 or not parameters:
        return []
    nbytes = FLOAT32 * parameters
    buckets = 1 + max(0, -(-(nbytes - FIRST_BUCKET) // BUCKET))
    return [Collective("dense gradients", "all_reduce", buckets, ring(nbytes, ranks))]


def of_row_norms(ranks: int, tables: int, groups: int) -> list[Collective]:
    """Return what ranks tell each other of the gradients of rows before a pass over perturbed rows."""
    nbytes = FLOAT64 * tables * (groups + 1)
    return [Collective("norms of gradients", "all_gather", 1, nbytes * (ranks - 1))] if ranks > 1 else []


def ring(nbytes: float, ranks: int) -> float:
    """Return what a rank sends in a sum over all ranks: each sends its share around twice."""
    return 2 * nbytes * (ranks - 1) / ranks
