"""Spans of row groups to windows: every column decoded, checked and permuted, by numpy alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctr.data import columns
from ctr.data.bags import Bags, decode_bags
from ctr.data.errors import DataError
from ctr.data.footers import RowGroups
from ctr.data.lanes import Span
from ctr.data.row_groups import RowGroup, Unreadable
from ctr.data.schema import FeatureConfig, Schema
from ctr.data.transforms import bucket, transform
from ctr.data.window import GOOD, REASONS, Buffers, Window

Arrays = list[pa.Array]


def is_bag(feature: FeatureConfig) -> bool:
    return feature.kind in ("ids", "sequence")


@dataclass(frozen=True)
class Source:
    """A span and the row group that it is read from."""

    span: Span
    group: RowGroup


class WindowDecoder:
    """Turns spans into windows. It holds settings only, so threads share one."""

    def __init__(self, schema: Schema, groups: RowGroups, skip_bad_rows: bool, drop_labels: bool):
        self.schema = schema
        self.groups = groups
        self.skip_bad_rows = skip_bad_rows
        self.labels = [] if drop_labels else schema.labels
        self.singles = [feature for feature in schema.categorical if not is_bag(feature)]
        self.steps = self._steps()
        self.columns = sorted({name for names, _ in self.steps for name in names})

    def decode(self, windows: list[tuple[list[Source], np.ndarray | None]], buffers: Buffers) -> list[Window]:
        """Windows that share their row groups, together: each column is decoded once for all of them.

        Each is given by its sources and by its order, int64 [n]: the row that is delivered at each place; None
        keeps the rows as stored. Windows lie in memory of `buffers`. Raises DataError for a bad row unless they
        are to be skipped.
        """
        while True:
            rows = [_Rows(self, sources, order, buffers) for sources, order in windows]
            try:
                for names, steps in self.steps:
                    for one in rows:
                        arrays = one.read(names)
                        for step in steps:
                            step(one, *arrays)
            except Unreadable:  # the row group is known for it now, and left out by the next attempt
                continue
            return [one.window() for one in rows]

    def _steps(self) -> list[tuple[tuple[str, ...], list[Callable]]]:
        """What is done with which columns. All that one column gives is done while it is in the cache."""
        schema = self.schema
        steps: dict[tuple[str, ...], list[Callable]] = {}

        def add(names: tuple[str, ...], step: Callable) -> None:
            steps.setdefault(names, []).append(step)

        for i, name in enumerate(self.labels):
            add((name,), lambda rows, arrays, i=i, name=name: _label(rows, arrays, i, name))
        if schema.weight:
            add((schema.weight,), _weight)
        if schema.group:
            add((schema.group,), _group)
        if schema.time:
            add((schema.time,), _time)
        row = 0
        for feature in schema.numeric:
            add((feature.column,), lambda rows, arrays, row=row, f=feature: _numeric(rows, arrays, row, f))
            row += 1 + feature.indicator
        for row, feature in enumerate(self.singles):
            add((feature.column,), lambda rows, arrays, row=row, f=feature: _single(rows, arrays, row, f))
        bags = [feature for feature in schema.categorical if is_bag(feature)]
        for i, feature in enumerate(bags):
            names = (feature.column, feature.weights) if feature.weights else (feature.column,)
            add(names, lambda rows, *arrays, i=i, f=feature: _bags(rows, arrays, i, f))
        return list(steps.items())


class _Rows:
    """The rows of one window while they are decoded: where they come from, their order, which are bad.

    Three numberings: scheduled (as the sources list them), decoded (without the row groups that cannot be
    read), and delivered (decoded, permuted by `order`).
    """

    def __init__(self, decoder: WindowDecoder, sources: list[Source], order: np.ndarray | None, buffers: Buffers):
        self.decoder, self.sources = decoder, sources
        self.scheduled_order = self.order = order
        self.scheduled = sum(source.span.stop - source.span.first for source in sources)
        self.reasons: np.ndarray | None = None  # uint8 [scheduled]
        self.readable: np.ndarray | None = None  # int64 [decoded], scheduled numbers; None for all
        self.decoded = self.scheduled
        if any(source.group.error is not None for source in sources):
            self._leave_out_unreadable()
        n, schema = self.decoded, decoder.schema
        self.numeric, numeric_buffer = buffers.take(len(schema.numeric_names), n, np.float32)
        self.ids, ids_buffer = buffers.take(len(decoder.singles), n, np.int64)
        self.buffers = (numeric_buffer, ids_buffer)
        self.present: np.ndarray | None = None
        self.bags = [_no_bags(n) for feature in schema.categorical if is_bag(feature)]
        self.labels = np.empty((len(decoder.labels), n), np.float32)
        self.weight = np.empty(n, np.float32) if schema.weight else None
        self.group = np.empty(n, np.int64) if schema.group else None
        self.time = np.empty(n, np.int64) if schema.time else None

    def read(self, names: tuple[str, ...]) -> list[Arrays]:
        """The decoded rows of some columns, each as arrays one after the other."""
        arrays: list[Arrays] = [[] for _ in names]
        for source in self.sources:
            if source.group.error is None:
                parts = source.group.read(names, source.span.first, source.span.stop)
                for column, part in zip(arrays, parts, strict=True):
                    column += part
        return arrays

    def gather(self, parts: list[np.ndarray], out: np.ndarray) -> None:
        """Concatenate decoded values and permute them into `out` [decoded]."""
        if not parts:
            return
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.order is None:
            out[:] = values
        elif values.dtype == out.dtype:
            # clip only to spare the buffering of mode 'raise'; it also releases the interpreter's lock
            np.take(values, self.order, out=out, mode="clip")
        else:
            out[:] = values[self.order]

    def mark(self, bad: np.ndarray, reason: str, column: str, expected: str, found: Callable[[int], object]):
        """bad: bool [decoded]. Raises for the first of them, or notes why they are dropped.

        found: decoded row number -> what stands there.
        """
        rows = np.flatnonzero(bad)
        scheduled = rows if self.readable is None else self.readable[rows]
        if not self.decoder.skip_bad_rows:
            where = self._where(int(scheduled[0]))
            raise DataError(f"{where}: column {column!r} found {found(int(rows[0]))}, expected {expected}")
        reasons = self._reasons()
        fresh = scheduled[reasons[scheduled] == GOOD]
        reasons[fresh] = REASONS.index(reason)

    def window(self) -> Window:
        """The delivered rows without those marked."""
        window = Window(
            self.numeric, self.ids, self.present, self.bags, self.labels, self.weight, self.group, self.time
        )
        window.buffers = self.buffers
        if self.reasons is None:
            return window
        order = self.scheduled_order
        reasons = self.reasons if order is None else self.reasons[order]
        decoded = reasons != REASONS.index("corrupt_row_group")
        good = window.take(np.flatnonzero(reasons[decoded] == GOOD))
        good.reasons = reasons
        good.good_before = np.concatenate([[0], np.cumsum(reasons == GOOD)])
        return good

    def _reasons(self) -> np.ndarray:
        if self.reasons is None:
            self.reasons = np.zeros(self.scheduled, np.uint8)
        return self.reasons

    def _leave_out_unreadable(self) -> None:
        if not self.decoder.skip_bad_rows:
            raise DataError(next(s.group.error for s in self.sources if s.group.error is not None))
        fine = [source.group.error is None for source in self.sources]
        readable = np.repeat(fine, [source.span.stop - source.span.first for source in self.sources])
        self._reasons()[~readable] = REASONS.index("corrupt_row_group")
        self.readable = np.flatnonzero(readable)
        self.decoded = len(self.readable)
        if self.order is not None:
            number = np.cumsum(readable) - 1
            self.order = number[self.order[readable[self.order]]]

    def _where(self, row: int) -> str:
        for source in self.sources:
            rows = source.span.stop - source.span.first
            if row < rows:
                return f"{self.decoder.groups.where(source.span.group)} row {source.span.first + row}"
            row -= rows
        raise AssertionError("row is past the window")


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _joined(parts: list[tuple]) -> np.ndarray | None:
    """The masks of (values, mask, ...) parts as one."""
    if len(parts) == 1:
        return parts[0][1]
    return columns.joined([part[1] for part in parts], [len(part[0]) for part in parts])


def _finder(values: np.ndarray, there: np.ndarray | None = None) -> Callable[[int], object]:
    return lambda row: "null" if there is not None and not there[row] else values[row]


def _label(rows: _Rows, arrays: Arrays, i: int, name: str) -> None:
    parts = [columns.floats(array) for array in arrays]
    values, there = _concatenated([part[0] for part in parts]), _joined(parts)
    fine = (values == 0) | (values == 1)
    fine = fine if there is None else fine & there
    if not fine.all():
        rows.mark(~fine, "label", name, "0 or 1", _finder(values, there))
    rows.gather([values], rows.labels[i])


def _weight(rows: _Rows, arrays: Arrays) -> None:
    parts = [columns.floats(array) for array in arrays]
    values, there = _concatenated([part[0] for part in parts]), _joined(parts)
    fine = np.isfinite(values) & (values >= 0)
    fine = fine if there is None else fine & there
    if not fine.all():
        expected = "a finite number of at least 0"
        rows.mark(~fine, "weight", rows.decoder.schema.weight, expected, _finder(values, there))
    rows.gather([values], rows.weight)


def _group(rows: _Rows, arrays: Arrays) -> None:
    parts = []
    for array in arrays:
        values, there, _ = columns.ids(array, "string")
        parts.append(values if there is None else np.where(there, values, columns.NULL_GROUP))
    rows.gather(parts, rows.group)


def _time(rows: _Rows, arrays: Arrays) -> None:
    parts = [columns.seconds(array) for array in arrays]
    there = _joined(parts)
    if there is not None:
        rows.mark(~there, "time", rows.decoder.schema.time, "a time", lambda row: "null")
    rows.gather([part[0] for part in parts], rows.time)


def _numeric(rows: _Rows, arrays: Arrays, row: int, feature: FeatureConfig) -> None:
    """One feature, and its indicator in the row behind."""
    parts = [columns.floats(array) for array in arrays]
    stored, there = _concatenated([part[0] for part in parts]), _joined(parts)
    with np.errstate(all="ignore"):  # what lies under nulls is arbitrary, and NaN is looked for below
        values = transform(feature, stored).astype(np.float32, copy=there is not None)
    if there is not None:
        np.copyto(values, np.float32(feature.missing), where=~there)
    if not np.isfinite(values).all():
        rows.mark(~np.isfinite(values), "numeric", feature.column, "a finite number", _finder(stored))
    rows.gather([values], rows.numeric[row])
    if feature.indicator:
        rows.numeric[row + 1] = 0
        if there is not None:
            rows.gather([~there], rows.numeric[row + 1])


def _single(rows: _Rows, arrays: Arrays, row: int, feature: FeatureConfig) -> None:
    """One id per row; `present` is False where it is null."""
    values, there = (_buckets if feature.kind == "numeric" else _ids)(rows, arrays, feature)
    if there is not None and feature.missing_id is not None:
        values = [np.where(there, _concatenated(values), np.int64(feature.missing_id))]
    elif there is not None:
        if rows.present is None:
            rows.present = np.ones(rows.ids.shape, bool)
        rows.gather([there], rows.present[row])
    rows.gather(values, rows.ids[row])


def _ids(rows: _Rows, arrays: Arrays, feature: FeatureConfig) -> tuple[list[np.ndarray], np.ndarray | None]:
    parts = [columns.ids(array, feature.dtype) for array in arrays]
    well_formed = columns.joined([part[2] for part in parts], [len(part[0]) for part in parts])
    if well_formed is not None:
        column = pa.chunked_array(arrays)
        found = lambda row: repr(column[row].as_py())  # noqa: E731
        rows.mark(~well_formed, "id", feature.column, "1 to 16 hexadecimal digits", found)
    return [part[0] for part in parts], _joined(parts)


def _buckets(rows: _Rows, arrays: Arrays, feature: FeatureConfig) -> tuple[list[np.ndarray], np.ndarray | None]:
    parts = [columns.floats(array) for array in arrays]
    values, there = _concatenated([part[0] for part in parts]), _joined(parts)
    finite = np.isfinite(values) if there is None else np.isfinite(values) | ~there
    if not finite.all():
        rows.mark(~finite, "numeric", feature.column, "a finite number", _finder(values))
    return [bucket(feature, values)], there


def _no_bags(rows: int) -> Bags:
    return Bags(np.zeros(0, np.int64), np.zeros(rows + 1, np.int64), None)


def _bags(rows: _Rows, arrays: tuple[Arrays, ...], i: int, feature: FeatureConfig) -> None:
    if not arrays[0]:
        return
    weights = arrays[1] if feature.weights else None
    rows.bags[i], problems = decode_bags(feature, arrays[0], weights, rows.order)
    for problem in problems:
        reason = "item_weight" if problem.column == feature.weights else "id"
        rows.mark(problem.rows, reason, problem.column, problem.expected, lambda row, p=problem: p.found)
