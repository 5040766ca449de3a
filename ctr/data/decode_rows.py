"""Decode what a row has beside its features: labels, weight, group and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from tessera.ctr.data import columns, single_values
from tessera.ctr.data.bags import Bags
from tessera.ctr.data.columns import Arrays, finder
from tessera.ctr.data.crosses import Ids
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.expressions import computed
from tessera.ctr.data.files import one_line
from tessera.ctr.data.labels import Label
from tessera.ctr.data.schema import LARGEST
from tessera.ctr.data.times import DAY, advice, described, far_future, refuse_unit, unit_of


class Chunk(Protocol):
    """What `decode.py` calls so: rows while they are decoded."""

    decoder: Any
    windows: list[Any]
    negative: np.ndarray | None
    passes: np.ndarray | None
    members: dict[str, Ids]

    def mark(
        self, bad: np.ndarray, reason: str, column: str, expected: str, found: Callable[[int], object]
    ) -> None: ...

    def deliver(self, values: np.ndarray, name: str, row: int | None = None) -> None: ...

    def deliver_vectors(self, values: np.ndarray, row: int) -> None: ...

    def deliver_bags(self, i: int, bags: Bags) -> None: ...

    def leave_out(self, rows: np.ndarray, reason: str) -> None: ...

    def deliver_known(self, there: np.ndarray, row: int) -> None: ...

    def group_weights(self) -> np.ndarray: ...

    def where(self, row: int) -> str: ...


def decode_filter(chunk: Chunk, *arrays: Arrays) -> None:
    """Leave out the rows of which `where` is not true, before anything can be wrong with them."""
    where = chunk.decoder.where
    if not all(arrays):  # there are no rows
        return
    try:
        found = computed(where, arrays)
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"{chunk.where(0)} and behind it: data.where: {one_line(error)}") from None
    chunk.passes = found.fill_null(fill_value=False).to_numpy(zero_copy_only=False).astype(bool)
    chunk.leave_out(~chunk.passes, "where")


def decode_label(chunk: Chunk, arrays: Arrays, i: int, task: Label) -> None:
    values, there = single_values.joined([columns.floats(array) for array in arrays])
    fine = np.abs(values) <= LARGEST if task.is_number else (values == 0) | (values == 1)
    if there is not None:
        fine = fine | ~there if task.nulls == "unknown" else fine & there
    if not fine.all():
        expected = f"a number of at most {LARGEST:.0e} either way" if task.is_number else "0 or 1"
        chunk.mark(~fine, "label", task.column, expected, finder(values, there))
    if there is not None and task.nulls == "unknown":
        values = np.where(there, values, 0).astype(np.float32)  # anything may lie under a null
        chunk.deliver_known(there, i)
    chunk.deliver(values, "labels", i)


def note_negatives(chunk: Chunk, arrays: Arrays) -> None:
    """Tell the chunk which rows have label 0."""
    values, there = single_values.joined([columns.floats(array) for array in arrays])
    chunk.negative = values == 0 if there is None else (values == 0) & there


def decode_nested(chunk: Chunk, arrays: Sequence[Arrays], task: Label) -> None:
    """Mark rows with a label whose space is another label that is 0 there."""
    own, own_there = single_values.joined([columns.floats(array) for array in arrays[0]])
    outer, outer_there = single_values.joined([columns.floats(array) for array in arrays[1]])
    bad = (own == 1) & (outer == 0)
    for there in (own_there, outer_there):
        bad = bad if there is None else bad & there
    if bad.any():
        assert task.parent is not None
        parent = chunk.decoder.tasks[task.parent].column
        expected = f"0 where {parent!r} is 0, as this model takes {parent!r} for the way to it"
        chunk.mark(bad, "label", task.column, expected, finder(own))


def decode_weight(chunk: Chunk, arrays: Arrays) -> None:
    values, there = single_values.joined([columns.floats(array) for array in arrays])
    fine = (values <= LARGEST) & (values >= 0)
    fine = fine if there is None else fine & there
    if not fine.all():
        expected, column = f"a finite number of at least 0 and at most {LARGEST:.0e}", chunk.decoder.schema.weight
        assert column is not None  # or it is not read
        chunk.mark(~fine, "weight", column, expected, finder(values, there))
    if chunk.decoder.groups.weight is not None:
        values = values * chunk.group_weights()
    chunk.deliver(values, "weight")


def decode_group(chunk: Chunk, arrays: Arrays) -> None:
    values, there = single_values.joined([columns.ids(array, "string") for array in arrays])
    if there is not None:
        values = columns.filled(values.astype(np.int64), there, columns.NULL_GROUP)
    chunk.deliver(values, "group")


def decode_time(chunk: Chunk, arrays: Arrays) -> None:
    if not arrays:
        return
    rule, stored = chunk.decoder.schema.times, arrays[0].type
    assert rule is not None  # or no time is read
    values, there = single_values.joined([columns.seconds(array, rule.unit) for array in arrays])
    if there is not None:
        chunk.mark(~there, "time", rule.column, "a time", lambda row: "null")
    outside, found = rule.outside(values), described(values, unit_of(rule, stored))
    fine = ~outside if there is None else ~outside & there
    if not fine.all():
        outside = outside if there is None else outside & there
        known = values if there is None else values[there]
        refuse_unit(rule, stored, known, lambda: chunk.where(int(outside.argmax())))
        if outside.any():
            expected = rule.expected + advice(rule, stored, int(values[outside.argmax()]))
            chunk.mark(outside, "time", rule.column, expected, found)
    for _, _, here, _ in chunk.windows:
        in_future = far_future(rule, values[here], fine[here])
        if in_future is not None:
            late = np.zeros(len(values), bool)
            late[here] = in_future
            expected = f"a time within {rule.jump / DAY:g} days of another row (data.schema.time_jump_days)"
            chunk.mark(late, "time", rule.column, expected, found)
    chunk.deliver(values, "time")
