"""Pieces of row groups to windows: every column decoded, checked and permuted, by numpy alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from ctr.data import columns
from ctr.data.bags import Bags, decode_bags
from ctr.data.errors import DataError
from ctr.data.footers import RowGroups
from ctr.data.row_groups import Piece
from ctr.data.schema import FeatureConfig, Schema
from ctr.data.transforms import bucket, transform
from ctr.data.window import GOOD, REASONS, Buffers, Window


def is_bag(feature: FeatureConfig) -> bool:
    return feature.kind in ("ids", "sequence")


class WindowDecoder:
    """Turns pieces of row groups into windows. It holds settings only, so threads share one."""

    def __init__(self, schema: Schema, groups: RowGroups, skip_bad_rows: bool, drop_labels: bool):
        self.schema = schema
        self.groups = groups
        self.skip_bad_rows = skip_bad_rows
        self.labels = [] if drop_labels else schema.labels
        names = [*self.labels, schema.weight, schema.group, schema.time]
        for feature in [*schema.numeric, *schema.categorical]:
            names += [feature.column, feature.weights]
        self.columns = sorted({name for name in names if name})

    def decode(self, pieces: list[Piece], order: np.ndarray | None, buffers: Buffers) -> Window:
        """order: int64 [n], the row of the pieces that is delivered at each place; None keeps them as stored.

        The window lies in memory of `buffers`. Raises DataError for a bad row unless they are to be skipped.
        """
        rows = _Rows(self, pieces, order)
        schema = self.schema
        labels = _numbers(rows, self.labels, "label", "0 or 1", lambda x: (x == 0) | (x == 1))
        weight = group = time = None
        if schema.weight:
            expected = "a finite number of at least 0"
            is_fine = lambda x: np.isfinite(x) & (x >= 0)  # noqa: E731
            weight = _numbers(rows, [schema.weight], "weight", expected, is_fine)[0]
        if schema.group:
            group = _group(rows, schema.group)
        if schema.time:
            time = _time(rows, schema.time)
        numeric, numeric_buffer = buffers.take(len(schema.numeric_names), rows.decoded, np.float32)
        _numeric(rows, schema, numeric)
        singles = [feature for feature in schema.categorical if not is_bag(feature)]
        ids, ids_buffer = buffers.take(len(singles), rows.decoded, np.int64)
        present = _single_ids(rows, singles, ids)
        bags = [_bags(rows, feature) for feature in schema.categorical if is_bag(feature)]
        window = Window(numeric, ids, present, bags, labels, weight, group, time)
        window.buffers = (numeric_buffer, ids_buffer)
        return rows.without_bad_ones(window)


class _Rows:
    """The rows of one window while they are decoded: where they come from, their order, which are bad.

    Three numberings: scheduled (as the pieces list them), decoded (without the pieces that cannot be read),
    and delivered (decoded, permuted by `order`).
    """

    def __init__(self, decoder: WindowDecoder, pieces: list[Piece], order: np.ndarray | None):
        self.decoder, self.pieces = decoder, pieces
        self.scheduled_order = self.order = order
        self.scheduled = sum(piece.rows for piece in pieces)
        self.batches = [piece.batch for piece in pieces if piece.batch is not None]
        self.decoded = sum(batch.num_rows for batch in self.batches)
        self.reasons: np.ndarray | None = None  # uint8 [scheduled]
        self.readable: np.ndarray | None = None  # int64 [decoded], scheduled numbers; None for all
        if self.decoded < self.scheduled:
            self._leave_out_unreadable()

    def chunks(self, column: str) -> list[pa.Array]:
        return [batch.column(column) for batch in self.batches]

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

    def without_bad_ones(self, window: Window) -> Window:
        """The window of delivered rows without those marked."""
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
        first = next(piece for piece in self.pieces if piece.batch is None)
        if not self.decoder.skip_bad_rows:
            where = self.decoder.groups.where(first.group)
            raise DataError(f"{where} row {first.first_row}: cannot be decoded: {first.error}")
        readable = np.repeat([p.batch is not None for p in self.pieces], [p.rows for p in self.pieces])
        self._reasons()[~readable] = REASONS.index("corrupt_row_group")
        self.readable = np.flatnonzero(readable)
        if self.order is not None:
            number = np.cumsum(readable) - 1
            self.order = number[self.order[readable[self.order]]]

    def _where(self, row: int) -> str:
        for piece in self.pieces:
            if row < piece.rows:
                return f"{self.decoder.groups.where(piece.group)} row {piece.first_row + row}"
            row -= piece.rows
        raise AssertionError("row is past the window")


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _joined(parts: list[tuple]) -> np.ndarray | None:
    """The masks of (values, mask, ...) parts as one."""
    return columns.joined([part[1] for part in parts], [len(part[0]) for part in parts])


def _numbers(rows: _Rows, names: list[str], reason: str, expected: str, is_fine) -> np.ndarray:
    """Label or weight columns, float32 [names, decoded]; null is never fine."""
    out = np.empty((len(names), rows.decoded), np.float32)
    for i, name in enumerate(names):
        parts = [columns.floats(array) for array in rows.chunks(name)]
        values, there = _concatenated([part[0] for part in parts]), _joined(parts)
        fine = is_fine(values) if there is None else is_fine(values) & there
        if not fine.all():
            rows.mark(~fine, reason, name, expected, _finder(values, there))
        rows.gather([values], out[i])
    return out


def _finder(values: np.ndarray, there: np.ndarray | None = None) -> Callable[[int], object]:
    return lambda row: "null" if there is not None and not there[row] else values[row]


def _group(rows: _Rows, name: str) -> np.ndarray:
    out = np.empty(rows.decoded, np.int64)
    parts = []
    for array in rows.chunks(name):
        values, there, _ = columns.ids(array, "string")
        parts.append(values if there is None else np.where(there, values, columns.NULL_GROUP))
    rows.gather(parts, out)
    return out


def _time(rows: _Rows, name: str) -> np.ndarray:
    out = np.empty(rows.decoded, np.int64)
    parts = [columns.seconds(array) for array in rows.chunks(name)]
    there = _joined(parts)
    if there is not None:
        rows.mark(~there, "time", name, "a time", lambda row: "null")
    rows.gather([part[0] for part in parts], out)
    return out


def _numeric(rows: _Rows, schema: Schema, out: np.ndarray) -> None:
    """To float32 [columns, decoded], indicators behind their features."""
    readers: list[FeatureConfig] = []  # of each row of out
    with np.errstate(all="ignore"):  # what lies under nulls is arbitrary, and NaN is looked for below
        for feature in schema.numeric:
            parts = [columns.floats(array) for array in rows.chunks(feature.column)]
            values, there = [transform(feature, part[0]) for part in parts], _joined(parts)
            if there is not None:
                values = [np.where(there, _concatenated(values), np.float32(feature.missing))]
            rows.gather(values, out[len(readers)])
            readers.append(feature)
            if feature.indicator:
                out[len(readers)] = 0
                if there is not None:
                    rows.gather([~there], out[len(readers)])
                readers.append(feature)
    if not np.isfinite(out).all():
        _mark_not_finite(rows, out, readers)


def _mark_not_finite(rows: _Rows, out: np.ndarray, readers: list[FeatureConfig]) -> None:
    for values, feature in zip(out, readers, strict=True):
        delivered = ~np.isfinite(values)
        if not delivered.any():
            continue
        bad = delivered
        if rows.order is not None:
            bad = np.zeros(rows.decoded, bool)
            bad[rows.order] = delivered
        stored = _concatenated([columns.floats(array)[0] for array in rows.chunks(feature.column)])
        rows.mark(bad, "numeric", feature.column, "a finite number", _finder(stored))


def _single_ids(rows: _Rows, features: list[FeatureConfig], out: np.ndarray) -> np.ndarray | None:
    """To int64 [features, decoded]. Returns bool of the same shape, False where null; None when nothing is."""
    present = None
    for i, feature in enumerate(features):
        read = _buckets if feature.kind == "numeric" else _ids
        values, there = read(rows, feature)
        if there is not None and feature.missing_id is not None:
            values = [np.where(there, np.concatenate(values), np.int64(feature.missing_id))]
        elif there is not None:
            if present is None:
                present = np.ones(out.shape, bool)
            rows.gather([there], present[i])
        rows.gather(values, out[i])
    return present


def _ids(rows: _Rows, feature: FeatureConfig) -> tuple[list[np.ndarray], np.ndarray | None]:
    arrays = rows.chunks(feature.column)
    parts = [columns.ids(array, feature.dtype) for array in arrays]
    well_formed = columns.joined([part[2] for part in parts], [len(part[0]) for part in parts])
    if well_formed is not None:
        column = pa.chunked_array(arrays)
        found = lambda row: repr(column[row].as_py())  # noqa: E731
        rows.mark(~well_formed, "id", feature.column, "1 to 16 hexadecimal digits", found)
    return [part[0] for part in parts], _joined(parts)


def _buckets(rows: _Rows, feature: FeatureConfig) -> tuple[list[np.ndarray], np.ndarray | None]:
    parts = [columns.floats(array) for array in rows.chunks(feature.column)]
    values, there = _concatenated([part[0] for part in parts]), _joined(parts)
    finite = np.isfinite(values) if there is None else np.isfinite(values) | ~there
    if not finite.all():
        rows.mark(~finite, "numeric", feature.column, "a finite number", _finder(values))
    return [bucket(feature, values)], there


def _bags(rows: _Rows, feature: FeatureConfig) -> Bags:
    if not rows.batches:
        return Bags(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.float32))
    weights = rows.chunks(feature.weights) if feature.weights else None
    bags, problems = decode_bags(feature, rows.chunks(feature.column), weights, rows.order)
    for problem in problems:
        reason = "item_weight" if problem.column == feature.weights else "id"
        rows.mark(problem.rows, reason, problem.column, problem.expected, lambda row, p=problem: p.found)
    return bags
