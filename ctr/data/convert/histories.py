"""Give each row of a log the history of its user: the newest events before it, as one list per column.

An event is a row of the log. The history of a row holds events of the same user with an *earlier* time, the newest
last: nothing that happens in the row's own second, so that rows tied in time (a page of impressions, a list rated at
once) do not see each other, whatever their order in the file. Ties are counted. Events of one second stand in the
order of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import types

from tessera.ctr.data import columns
from tessera.embedding.errors import ConfigError

LIST_ROWS = 16384  # rows whose lists are made at a time
# Columns of this module in a table of rows that are being grouped.
KEY, HAS_KEY, SECONDS, PLACE = "__key", "__has_key", "__seconds", "__place"
AGO = "history_seconds_ago"  # the list that the column of times becomes


@dataclass(frozen=True)
class HistoryRule:
    """Which events a row's history holds, and what of them. Raises ConfigError.

    by: the column whose rows of one value are one history. columns: of each event; of the column `time` the seconds
    that lie between event and row are kept. where: only rows with 1 in this column become events; None: all.
    time_unit: of integer times. memory_bytes: about what grouping may take.
    """

    by: str
    columns: tuple[str, ...]
    length: int
    time: str
    where: str | None = None
    time_unit: str = "s"
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if not self.columns:
            raise ConfigError("--history: found no column, expected at least one, such as item_id")
        if len(set(self.columns)) < len(self.columns):
            raise ConfigError(f"--history: found {' '.join(self.columns)}, expected each column once")
        if self.length < 1:
            raise ConfigError(f"--length: found {self.length}, expected at least 1 event")
        if self.memory_bytes < 1 << 24:
            raise ConfigError(f"--memory-mb: found {self.memory_bytes >> 20}, expected at least 16")

    def name(self, column: str) -> str:
        """Return the name of the list that a column of events becomes."""
        return AGO if column == self.time else f"history_{column}"

    @property
    def read(self) -> list[str]:
        """Names of all columns that are read for histories, each once."""
        named = [self.by, self.time, *self.columns, *([self.where] if self.where else [])]
        return list(dict.fromkeys(named))


@dataclass(frozen=True)
class Spans:
    """Of n rows, those of one user side by side and in order of time: row i has the events first[i] to stop[i] of
    `events`, int64 places of rows. ties: rows that share user and second with another one."""

    events: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    ties: int


def spans(key: np.ndarray, seconds: np.ndarray, is_event: np.ndarray, length: int) -> Spans:
    """Return the events of each row's history. key, seconds: int64 [n], sorted by both; is_event: bool [n]."""
    rows = len(key)
    places = np.arange(rows)
    new_user = np.ones(rows, bool)
    np.not_equal(key[1:], key[:-1], out=new_user[1:])
    new_second = new_user.copy()
    new_second[1:] |= seconds[1:] != seconds[:-1]
    of_user = np.maximum.accumulate(np.where(new_user, places, 0))
    of_second = np.maximum.accumulate(np.where(new_second, places, 0))
    before = np.concatenate([[0], np.cumsum(is_event)])  # events among the rows before each
    stop = before[of_second]
    first = np.maximum(before[of_user], stop - length)
    sizes = np.bincount(np.cumsum(new_second) - 1, minlength=0) if rows else np.zeros(0, np.int64)
    return Spans(np.flatnonzero(is_event), first, stop, int(sizes[sizes > 1].sum()))


def with_histories(table: pa.Table, rule: HistoryRule) -> tuple[list[pa.Table], int]:
    """Return the rows of `table`, which has the columns KEY to PLACE, sorted by user and time and with a list column
    per column of the rule, in pieces; and the number of ties. Rows without a user have empty histories."""
    key, seconds, place = (table.column(name).to_numpy() for name in (KEY, SECONDS, PLACE))
    known = table.column(HAS_KEY).to_numpy()
    order = np.lexsort((place, seconds, key, ~known))
    table = table.take(pa.array(order))
    key, seconds, known = key[order], seconds[order], known[order]
    is_event = known.copy()
    if rule.where is not None:
        values, there = columns.floats(_whole(table.column(rule.where)))
        is_event &= values == 1 if there is None else (values == 1) & there
    users = int(known.sum())
    found = spans(key[:users], seconds[:users], is_event[:users], rule.length)
    nothing = np.zeros(len(key) - users, np.int64)
    first, stop = np.concatenate([found.first, nothing]), np.concatenate([found.stop, nothing])
    events = {name: _values(_whole(table.column(name))) for name in rule.columns if name != rule.time}
    pieces = []
    for begin in range(0, len(key), LIST_ROWS):
        here = slice(begin, begin + LIST_ROWS)
        piece, lengths = table.slice(begin, LIST_ROWS), (stop - first)[here]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        at = found.events[np.repeat(first[here] - offsets[:-1], lengths) + np.arange(offsets[-1])]
        for name in rule.columns:
            if name == rule.time:
                items = pa.array(np.repeat(seconds[here], lengths) - seconds[at])
            else:
                items = events[name].take(pa.array(at))
            made = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), items)
            piece = piece.append_column(rule.name(name), made)
        pieces.append(piece)
    return pieces, found.ties


def features(rule: HistoryRule, stored: pa.Schema, tables: Sequence[str]) -> list[dict]:
    """Return the schema's entries of the lists, one group of aligned sequences; they share the tables of the columns
    that they come from where there is such a table (one of `tables`)."""
    made: list[dict] = []
    for column in rule.columns:
        entry: dict = {"name": rule.name(column), "kind": "sequence", "pooling": "none", "align": "history"}
        entry |= {"max_length": rule.length}
        kind = _event_type(stored.field(column).type)
        if column == rule.time:
            entry |= {"dtype": "float", "transform": "bucketise", "boundaries": [float(4**k) for k in range(1, 13)]}
        elif types.is_floating(kind) or types.is_decimal(kind):
            entry |= {"dtype": "float"}
        else:
            text = types.is_string(kind) or types.is_large_string(kind)
            entry |= {"dtype": "string" if text else "int"}
            if column in tables:
                entry |= {"table": column}
        made.append(entry)
    return made


def _event_type(stored: pa.DataType) -> pa.DataType:
    if types.is_dictionary(stored):
        stored = stored.value_type
    return stored.value_type if types.is_list(stored) or types.is_large_list(stored) else stored


def _values(array: pa.Array) -> pa.Array:
    """Return one value per event: of a list its first item, null where it has none."""
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (types.is_list(array.type) or types.is_large_list(array.type)):
        return array
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if len(lengths) else lengths
    return array.flatten().take(pa.array(starts, mask=lengths == 0))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
