"""Configure one embedding table, apart from where it lives."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch

from tessera.embedding.errors import ConfigError
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tessera.embedding.settings import check, required, section, setting
from tessera.kernels.formats import (
    BITS,
    FORMATS,
    ROUNDINGS,
    is_int,
    stored_columns,
    stored_dtype,
)
from tessera.kernels.layout import RowLayout, packed_layout, plain_layout
from tessera.kernels.optimizers import state_width
from tessera.kernels.record_layout import RecordLayout, record_layout
from tessera.kernels.reference.id_map import LIMIT, SPREAD

ADMISSIONS = ("none", "exact", "sliding", "probabilistic", "vocabulary")
EVICTIONS = ("lru", "lfu", "raise")
SLIDING_MAX = 15  # the counters of the sliding filter have 4 bits
META_BYTES = 32  # time, count, id and mark of a row
PERIOD_BYTES = 8  # where rows know the period in which they were added
DECAY_BYTES = 8  # of each number of `decay_floats`
# The id map takes 16 bytes a slot; a segment with the lowest limit that has just been split is half that full.
MAP_BYTES_PER_ROW = math.ceil(16 / (LIMIT * 2**-SPREAD / 2))


def key_of(name: str) -> int:
    """Return a signed 64-bit number that stands for a name in the counter-based generator."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def scale_of_range(format: str, largest: float) -> float:
    """Return the scale with which codes of an int format reach from -largest to nearly largest."""
    return largest / (1 << (BITS[format] - 1))


@dataclass(frozen=True)
class TableConfig:
    """One table: rows of `dim` floats keyed by raw 64-bit ids.

    `features` are the id columns looked up in it. Rows start at N(0, init_std), drawn from (seed, table name, row)
    alone.
    """

    name: str
    dim: int
    features: tuple[str, ...]
    init_std: float

    @property
    def key(self) -> int:
        """A signed 64-bit number that stands for the name in the counter-based generator."""
        return key_of(self.name)


@dataclass(frozen=True)
class Group:
    """Columns of a row that are one embedding: `dim` values that start at N(0, init_std).

    format, rounding: how they are stored, see `kernels/formats.py` and `kernels/quantise.py`. scale: the scale that
    a new row of an int format has, which it keeps (LPT) unless `learned` says how it is learned (ALPT).
    """

    name: str
    dim: int = required("columns", at_least=1)
    init_std: float = required("first values of a row are N(0, this), drawn from (seed, table, id)", at_least=0)
    format: str = setting(
        "fp32", "how rows are stored: fp32 | fp16 | bf16 | int8 | int4 | int2; docs/low_precision.md", choices=FORMATS
    )
    rounding: str = setting("stochastic", "of values that are stored: stochastic | nearest", choices=ROUNDINGS)
    scale: float = setting(0.01, "int formats: the scale that a row begins with", above=0)
    learned: ScaleOptimizer | None = None


@dataclass(unsafe_hash=True)  # not frozen: OmegaConf fills it key by key; once in a table, nobody changes it
class Admission:
    """Rule by which an unknown id gets a row; `embedding/admission.py` has the filters.

    The sliding filter errs towards admission. The probabilistic rule has no memory at all: it admits after `threshold`
    times with probability 95 %. A vocabulary is counted beforehand: its ids have rows from their first batch on, others
    never.
    """

    kind: str = setting(
        "none",
        "none: all | exact: seen threshold times | sliding: so, in bounded memory | probabilistic | "
        "vocabulary: counted threshold times beforehand",
        choices=ADMISSIONS,
    )
    threshold: int = setting(1, "occurrences before an id gets its row", at_least=1)
    vocabulary: str | None = setting(None, "vocabulary: folder that tessera prepare stats --vocabulary has written")
    capacity: int = setting(1 << 20, "sliding: ids that the filter of one table remembers", at_least=1)
    splits: int = setting(7, "sliding: parts in which it forgets them", at_least=4)


@dataclass(frozen=True)
class DynamicTableConfig:
    """One table that gives every id a row of its own.

    features: the id columns looked up in it. groups: the embeddings that one id has here. seed: with the table's and
    the group's name and the id it fixes a row's initial values. ttl_seconds: a row not seen for so long expires (None:
    never). max_rows, max_bytes: the limit of one rank's part of the table (None: memory). eviction: what a full table
    does: evict the least recently (lru) or least frequently (lfu) used rows, or raise TableFull. evicted_kept: evicted
    ids that are kept for `take_evicted`. chunk_rows: rows by which a table by itself reserves memory, a power of two.
    cache_rows, cache_bytes: the table is in host memory, and a device holds so many of its rows (None: all of them
    are there).

    Raises ConfigError, one line, for values that cannot work.
    """

    name: str
    features: tuple[str, ...]
    groups: tuple[Group, ...]
    optimizer: RowOptimizer = field(default_factory=RowOptimizer)
    seed: int = 0
    admission: Admission = section(Admission, "which ids get a row")
    ttl_seconds: int | None = setting(
        None, "rows not seen for so long expire", above=0, expected="a number of seconds above 0, or null"
    )
    max_rows: int | None = setting(None, "most rows of a rank's part", at_least=1)
    max_bytes: int | None = None
    eviction: str = setting(
        "raise",
        "what a full table does: lru: give up rows seen longest ago | lfu: seen least | raise",
        choices=EVICTIONS,
    )
    evicted_kept: int = setting(1 << 20, "evicted ids that are kept for `take_evicted`", at_least=0)
    chunk_rows: int = 1 << 18
    cache_rows: int | None = setting(None, "rows that the device holds", at_least=1)
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        check(self, f"table {self.name}: ")
        self._check_groups()
        self._check_optimizer()
        self._check_formats()
        self._check_admission()
        self._check_limits()

    @property
    def width(self) -> int:
        """Floats of one row that a look-up returns: those of all groups."""
        return sum(group.dim for group in self.groups)

    @property
    def state_width(self) -> int:
        """Floats of optimizer state of one row, that of learned scales included."""
        return sum(sum(self.state_widths(group)) for group in self.groups)

    def state_widths(self, group: Group) -> tuple[int, int]:
        """Return the floats of state of a group's values and of its learned scale."""
        layout = self.layout(group)
        return state_width(self.optimizer.name, group.dim), 0 if layout is None else layout.scale_state

    def layout(self, group: Group) -> RowLayout | None:
        """Return the layout of a group's packed rows; None for rows of float32 alone."""
        if group.format == "fp32" and self.optimizer.state_format == "fp32":
            return None
        return packed_layout(
            group.format,
            group.dim,
            self.optimizer.name,
            learned=group.learned is not None,
            state_format=self.optimizer.state_format,
            rounding=group.rounding,
        )

    @property
    def values_dtype(self) -> torch.dtype:
        """dtype of values in storage form: that of all groups, or uint8 (their bytes) where they differ."""
        found = {stored_dtype(group.format) for group in self.groups}
        return found.pop() if len(found) == 1 else torch.uint8

    def values_columns(self, group: Group) -> int:
        """Return the columns of `values_dtype` that hold a group's values in storage form."""
        columns = stored_columns(group.format, group.dim)
        return columns * stored_dtype(group.format).itemsize // self.values_dtype.itemsize

    @property
    def knows_periods(self) -> bool:
        """True if rows keep the period in which they were added."""
        return self.optimizer.old_rows_factor != 1

    @property
    def decay_floats(self) -> int:
        """Numbers by which a row knows how far it is decayed: 0 where rows do not decay, 2 where counts play a part."""
        return 0 if not self.optimizer.decay else 1 if not self.optimizer.decay_count_power else 2

    @property
    def has_scales(self) -> bool:
        """True if some group has scales."""
        return any(is_int(group.format) for group in self.groups)

    @property
    def learns_scales(self) -> bool:
        return any(group.learned is not None for group in self.groups)

    @property
    def stored_bytes(self) -> int:
        """Bytes of values, scales and state of one row."""
        layouts = [(group, self.layout(group)) for group in self.groups]
        return sum(4 * (g.dim + self.state_widths(g)[0]) if at is None else at.bytes for g, at in layouts)

    @property
    def record(self) -> RecordLayout:
        """Where all that belongs to a row lies in a set of tables."""
        layouts = [self.layout(group) or plain_layout(group.dim, self.optimizer.name) for group in self.groups]
        return record_layout(layouts, PERIOD_BYTES * self.knows_periods, self.decay_floats)

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one more row needs at most: its record, whole with what fills it up to vectors and cache lines,
        or where the table has a cache its values, state, time, count and id; and its place in the id map."""
        if self.cache_limit is None:
            return self.record.bytes + MAP_BYTES_PER_ROW
        known = self.knows_periods * PERIOD_BYTES + self.decay_floats * DECAY_BYTES
        return self.stored_bytes + META_BYTES + known + MAP_BYTES_PER_ROW

    @property
    def row_limit(self) -> int | None:
        """Most rows, by whichever limit is tighter; None without a limit."""
        limits = [] if self.max_rows is None else [self.max_rows]
        if self.max_bytes is not None:
            limits.append(self.max_bytes // self.bytes_per_row)
        return min(limits, default=None)

    @property
    def cache_limit(self) -> int | None:
        """Rows that the device holds, by whichever limit is tighter; None where the table has no cache."""
        limits = [] if self.cache_rows is None else [self.cache_rows]
        if self.cache_bytes is not None:
            limits.append(self.cache_bytes // (self.stored_bytes + self.decay_floats * DECAY_BYTES))
        return min(limits, default=None)

    def key(self, group: Group) -> int:
        """Return the table key of a group's initial values, the same as that of a static table `<table>_<group>`."""
        return key_of(f"{self.name}_{group.name}")

    def check_batch(self, rows_per_batch: int) -> None:
        """Raise ConfigError unless all distinct ids of the largest batch fit the limit at once."""
        limit = self.row_limit
        if limit is not None and limit < rows_per_batch:
            key, value = self._tighter_limit()
            raise ConfigError(
                f"table {self.name}: {key} {value:,} is a limit of {limit:,} rows; "
                f"expected at least {rows_per_batch:,}, which one batch can bring"
            )

    def _tighter_limit(self) -> tuple[str, int]:
        if self.max_bytes is not None and self.row_limit != self.max_rows:
            return "max_bytes", self.max_bytes
        assert self.max_rows is not None
        return "max_rows", self.max_rows

    def _fail(self, key: str, found: object, expected: str) -> None:
        raise ConfigError(f"table {self.name}: {key} is {found!r}; expected {expected}")

    def _check_groups(self) -> None:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names):
            self._fail("groups", names, "one or more groups with different names")
        for group in self.groups:
            check(group, f"table {self.name}: groups.{group.name}.")

    def _check_optimizer(self) -> None:
        optimizer = self.optimizer
        if optimizer.old_rows_factor != 1 and optimizer.name == "ftrl":
            # FTRL computes the values from its state and its rate: another rate alone would move rows.
            self._fail("optimizer.old_rows_factor", optimizer.old_rows_factor, "1 for ftrl")
        if optimizer.decay * optimizer.lr >= 1:
            self._fail("optimizer.decay", optimizer.decay, f"less than 1 / lr, which is {1 / optimizer.lr:g}")
        if optimizer.initial_accumulator and optimizer.name not in ("adagrad", "rowwise_adagrad"):
            self._fail("optimizer.initial_accumulator", optimizer.initial_accumulator, f"0 for {optimizer.name}")

    def _check_formats(self) -> None:
        optimizer = self.optimizer
        if optimizer.state_format != "fp32" and optimizer.name != "adam":
            self._fail("optimizer.state_format", optimizer.state_format, f"fp32 for {optimizer.name}")
        for group in self.groups:
            key = f"groups.{group.name}"
            if is_int(group.format) and optimizer.name == "ftrl":
                # FTRL computes the values from its state, so int8 values would still have a copy in full precision.
                self._fail(f"{key}.format", group.format, "fp32, fp16 or bf16 with optimizer ftrl")
            if group.learned is not None and not is_int(group.format):
                self._fail(f"{key}.format", group.format, "int8, int4 or int2 with a learned scale")

    def _check_admission(self) -> None:
        admission = self.admission
        if admission.kind == "sliding" and admission.threshold > SLIDING_MAX:
            self._fail("admission.threshold", admission.threshold, f"at most {SLIDING_MAX} for the sliding filter")
        if admission.kind == "vocabulary" and not admission.vocabulary:
            expected = "the folder that `tessera prepare stats --vocabulary` writes"
            self._fail("admission.vocabulary", admission.vocabulary, expected)

    def _check_limits(self) -> None:
        if self.max_bytes is not None and self.max_bytes < self.bytes_per_row:
            self._fail("max_bytes", self.max_bytes, f"at least the {self.bytes_per_row} bytes of one row, or null")
        if self.cache_bytes is not None and self.cache_bytes < self.stored_bytes:
            self._fail("cache_bytes", self.cache_bytes, f"at least the {self.stored_bytes} bytes of one row, or null")
        if self.chunk_rows < 1 or self.chunk_rows & (self.chunk_rows - 1):
            self._fail("chunk_rows", self.chunk_rows, "a power of two")
