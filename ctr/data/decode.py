"""Decode spans of row groups to windows: every column is decoded, checked and permuted, by numpy alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tessera.ctr.data import columns
from tessera.ctr.data.aligned import AlignedStep
from tessera.ctr.data.bags import Bags, bags_of, is_bag, no_bags
from tessera.ctr.data.columns import Arrays
from tessera.ctr.data.crosses import Ids
from tessera.ctr.data.decode_features import (
    decode_bags_of,
    decode_cross,
    decode_numeric,
    decode_only_crossed,
    decode_single,
    decode_vector,
    of_expression,
)
from tessera.ctr.data.decode_rows import (
    decode_filter,
    decode_group,
    decode_label,
    decode_nested,
    decode_time,
    decode_weight,
    note_negatives,
)
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.expressions import Expression
from tessera.ctr.data.footers import RowGroups
from tessera.ctr.data.lanes import Span
from tessera.ctr.data.negatives import Negatives
from tessera.ctr.data.row_groups import RowGroup, Unreadable
from tessera.ctr.data.schema import Feature, Schema, length_of
from tessera.ctr.data.window import GOOD, REASONS, Buffers, Window


@dataclass(frozen=True)
class Source:
    """A span and the row group from which it is read."""

    span: Span
    group: RowGroup


class WindowDecoder:
    """Turns spans into windows. It holds settings only, so threads share one."""

    def __init__(
        self,
        schema: Schema,
        groups: RowGroups,
        *,
        skip_bad_rows: bool,
        drop_labels: bool,
        numbered: bool = False,
        nested: bool = False,
        negatives: Negatives | None = None,
        where: Expression | None = None,
    ):
        """where: rows of which it is not true are left out. negatives: which rows with label 0 are kept. nested: a
        label of 1 where the label that its space is (`where`) is 0 makes a row a bad one."""
        self.schema = schema
        self.first_numbers = groups.first if numbered else None
        self.groups = groups
        self.skip_bad_rows = skip_bad_rows
        self.tasks = () if drop_labels else schema.tasks
        self.nested = nested
        self.negatives, self.where = negatives, where
        self.singles = [feature for feature in schema.categorical if not is_bag(feature)]
        self.steps = self._steps()
        self.crossed = {member.name for cross in schema.crosses for member in cross.members}
        self.columns = sorted({name for names, _ in self.steps for name in names})

    def decode(
        self, sources: list[Source], windows: list[tuple[int, np.ndarray | None]], buffers: Buffers
    ) -> list[Window]:
        """Decode a chunk: some spans of row groups, cut into windows.

        Each window is given by its rows and by its order, int64 [rows]: the row of the window that is delivered
        at each place; None keeps the rows as stored. Windows lie in memory of `buffers`. Raises DataError for a
        bad row unless they are to be skipped.
        """
        while True:
            chunk = Chunk(self, sources, windows, buffers)
            try:
                for names, steps in self.steps:
                    arrays = chunk.read(names) if names else []
                    for step in steps:
                        step(chunk, *arrays)
                chunk.deliver_places()
                if self.negatives is not None:
                    chunk.sample(self.negatives)
            except Unreadable:  # its row group is marked as such now, and left out by the next attempt
                continue
            return chunk.finished()

    def _steps(self) -> list[tuple[tuple[str, ...], list[Callable]]]:
        """Return the decoding steps, each with its columns. All steps of one column run together while it is in the
        cache."""
        schema = self.schema
        steps: dict[tuple[str, ...], list[Callable]] = {}

        def add(names: tuple[str, ...], step: Callable) -> None:
            steps.setdefault(names, []).append(step)

        if self.where is not None:
            add(self.where.columns, decode_filter)
        if self.negatives is not None:
            add((self.tasks[0].column,), note_negatives)
        for i, task in enumerate(self.tasks):
            add((task.column,), lambda chunk, arrays, i=i, task=task: decode_label(chunk, arrays, i, task))
            if task.parent is not None and self.nested:
                parent = schema.tasks[task.parent].column
                add((task.column, parent), lambda chunk, *arrays, task=task: decode_nested(chunk, arrays, task))
        if schema.weight:
            add((schema.weight,), decode_weight)
        if schema.group:
            add((schema.group,), decode_group)
        if schema.time:
            add((schema.time,), decode_time)

        def of_column(feature: Feature, step: Callable) -> None:
            if feature.expression:
                add(feature.expression.columns, of_expression(step, feature))
            else:
                add((feature.column,), step)

        row = 0
        for feature in schema.numeric:
            of_column(feature, lambda chunk, arrays, row=row, f=feature: decode_numeric(chunk, arrays, row, f))
            row += 1 + feature.indicator
        self._add_vectors(add)
        for row, feature in enumerate(self.singles):
            if feature.members:
                continue
            of_column(feature, lambda chunk, arrays, row=row, f=feature: decode_single(chunk, arrays, row, f))
        for i, feature in enumerate(bags_of(schema)):
            if feature.pooling == "none" or feature.members:
                continue
            own = (feature.column, feature.weights) if feature.weights else (feature.column,)
            add(own, lambda chunk, *arrays, i=i, f=feature: decode_bags_of(chunk, arrays, i, f))
        places = {feature.name: i for i, feature in enumerate(bags_of(schema))}
        for group in schema.sequences.values():
            names = tuple(dict.fromkeys(feature.column for feature in group))
            step = AlignedStep(group, names, [places[feature.name] for feature in group])
            add(names, step)
        for feature in schema.only_crossed:
            of_column(feature, lambda chunk, arrays, f=feature: decode_only_crossed(chunk, arrays, f))
        rows = {feature.name: row for row, feature in enumerate(self.singles)}
        for feature in schema.crosses:  # behind all columns, which their members are read from
            place = rows[feature.name] if feature.name in rows else places[feature.name]
            add((), lambda chunk, place=place, f=feature: decode_cross(chunk, place, f))
        return list(steps.items())

    def _add_vectors(self, add: Callable[[tuple[str, ...], Callable], None]) -> None:
        names, row = self.schema.numeric_names, len(self.schema.scalar_names)
        for feature in self.schema.vectors:
            at = names.index(f"{feature.name}_missing") if feature.indicator else None
            add(
                (feature.column,),
                lambda chunk, arrays, row=row, f=feature, at=at: decode_vector(chunk, arrays, row, f, at),
            )
            row += length_of(feature)


class _Delivery:
    """A window that is being filled."""

    def __init__(self, decoder: WindowDecoder, rows: int, order: np.ndarray | None, buffers: Buffers):
        schema = decoder.schema
        self.order = order
        self.numeric, numeric_buffer = buffers.take(len(schema.numeric_names), rows, np.float32)
        self.ids, ids_buffer = buffers.take(len(decoder.singles), rows, np.int64)
        self.buffers = (numeric_buffer, ids_buffer)
        self.present: np.ndarray | None = None
        self.bags = [no_bags(rows, feature) for feature in bags_of(schema)]
        self.labels = np.empty((len(decoder.tasks), rows), np.float32)
        self.known: np.ndarray | None = None
        weighted = schema.weight or decoder.groups.weight is not None
        self.weight = np.empty(rows, np.float32) if weighted else None
        self.group = np.empty(rows, np.int64) if schema.group else None
        self.time = np.empty(rows, np.int64) if schema.time else None
        self.number = None if decoder.first_numbers is None else np.empty(rows, np.int64)

    def window(self) -> Window:
        fields = (self.numeric, self.ids, self.present, self.bags, self.labels)
        window = Window(*fields, self.weight, self.group, self.time, self.number)
        window.known = self.known
        window.buffers = self.buffers
        return window


class Chunk:
    """The rows of some windows while they are decoded: their origin, and which are bad.

    Rows are numbered as scheduled (as the sources list them) or as decoded (without row groups that cannot be
    read); each window puts its decoded rows into the order of delivery.
    """

    def __init__(self, decoder: WindowDecoder, sources: list[Source], windows: list, buffers: Buffers):
        self.decoder, self.sources = decoder, sources
        self.reasons: np.ndarray | None = None  # uint8 [scheduled], index into REASONS
        self.passes: np.ndarray | None = None  # bool [decoded], where rows are filtered
        self.negative: np.ndarray | None = None  # bool [decoded], where rows with label 0 are sampled
        self.members: dict[str, Ids] = {}  # of crosses, as decoded
        self.scheduled = sum(source.span.stop - source.span.first for source in sources)
        assert self.scheduled == sum(rows for rows, _ in windows)
        self.readable = readable = self._readable()
        self.numbers = None if readable is None else np.flatnonzero(readable)  # decoded -> scheduled
        # Per window: scheduled rows, scheduled order, decoded rows, and the arrays to fill.
        self.windows: list[tuple[slice, np.ndarray | None, slice, _Delivery]] = []
        first = decoded = 0
        for rows, order in windows:
            here = slice(first, first + rows)
            kept, kept_order = rows, order
            if readable is not None:
                kept = int(readable[here].sum())
                if order is not None:
                    kept_order = (np.cumsum(readable[here]) - 1)[order[readable[here][order]]]
            delivery = _Delivery(decoder, kept, kept_order, buffers)
            self.windows.append((here, order, slice(decoded, decoded + kept), delivery))
            first, decoded = first + rows, decoded + kept

    def read(self, names: tuple[str, ...]) -> list[Arrays]:
        """Return the decoded rows of some columns, each as arrays one after the other."""
        arrays: list[Arrays] = [[] for _ in names]
        for source in self.sources:
            if source.group.is_read:
                parts = source.group.read(names, source.span.first, source.span.stop)
                for column, part in zip(arrays, parts, strict=True):
                    column += [columns.plain(array) for array in part]
        return arrays

    def deliver(self, values: np.ndarray, name: str, row: int | None = None) -> None:
        """Write decoded values to a row of the windows' arrays of this name, each window in its own order."""
        for _, _, here, delivery in self.windows:
            out = getattr(delivery, name)
            out = out if row is None else out[row]
            if delivery.order is None:
                out[:] = values[here]
            elif values.dtype == out.dtype:
                # clip only to spare the buffering of mode 'raise'; it also releases the interpreter's lock
                values[here].take(delivery.order, out=out, mode="clip")
            else:
                out[:] = values[here][delivery.order]

    def deliver_vectors(self, values: np.ndarray, row: int) -> None:
        """Write decoded vectors [n, length] to the windows' numeric rows from `row` on."""
        for _, _, here, delivery in self.windows:
            part = values[here] if delivery.order is None else values[here][delivery.order]
            delivery.numeric[row : row + values.shape[1]] = part.T

    def deliver_known(self, there: np.ndarray, row: int) -> None:
        """Write which labels of one task are known, bool [decoded], where some are not."""
        for _, _, here, delivery in self.windows:
            if not there[here].all():
                if delivery.known is None:
                    delivery.known = np.ones(delivery.labels.shape, bool)
                found = there[here]
                delivery.known[row] = found if delivery.order is None else found[delivery.order]

    def deliver_bags(self, i: int, bags: Bags) -> None:
        """Write decoded bags to the windows, as number `i` of theirs."""
        for _, _, here, delivery in self.windows:
            rows = np.arange(here.stop - here.start) if delivery.order is None else delivery.order
            delivery.bags[i] = bags.take(here.start + rows)

    def deliver_places(self) -> None:
        """Deliver what follows from the position of rows: their numbers, and weights given per row group."""
        if self.decoder.first_numbers is not None:
            self.deliver(self.row_numbers(self.decoder.first_numbers), "number")
        if self.decoder.groups.weight is not None and not self.decoder.schema.weight:
            self.deliver(self.group_weights(), "weight")

    def group_weights(self) -> np.ndarray:
        """Return float32 [decoded]: the weight of the row group of each row."""
        spans = [source.span for source in self.sources if source.group.is_read]
        groups = np.array([span.group for span in spans], np.int64)
        weight = self.decoder.groups.weight
        assert weight is not None
        return np.repeat(weight[groups], [span.stop - span.first for span in spans])

    def row_numbers(self, first: np.ndarray) -> np.ndarray:
        """Return the numbers of the decoded rows, int64, where row groups begin with the numbers `first`."""
        spans = [source.span for source in self.sources if source.group.is_read]
        numbers = [np.arange(first[s.group] + s.first, first[s.group] + s.stop) for s in spans]
        return np.concatenate(numbers) if numbers else np.zeros(0, np.int64)

    def sample(self, negatives: Negatives) -> None:
        """Leave out the rows that sampling does."""
        assert self.negative is not None
        left_out = self.negative & ~negatives.kept(self.row_numbers(self.decoder.groups.first))
        self.leave_out(left_out, "sampled")

    def leave_out(self, rows: np.ndarray, reason: str) -> None:
        """Record why rows are dropped that are not bad, bool [decoded]; bad ones stay so."""
        found = np.flatnonzero(rows)
        scheduled = found if self.numbers is None else self.numbers[found]
        if not len(scheduled):
            return
        if self.reasons is None:
            self.reasons = np.zeros(self.scheduled, np.uint8)
        fresh = scheduled[self.reasons[scheduled] == GOOD]
        self.reasons[fresh] = REASONS.index(reason)

    def mark(self, bad: np.ndarray, reason: str, column: str, expected: str, found: Callable[[int], object]) -> None:
        """Raise for the first bad row, or record why the bad rows are dropped. bad: bool [decoded].

        found: decoded row number -> what stands there.
        """
        if self.passes is not None and not (bad := bad & self.passes).any():
            return
        if not self.decoder.skip_bad_rows:
            rows = np.flatnonzero(bad)
            raise DataError(
                f"{self.where(int(rows[0]))}: column {column!r} found {found(int(rows[0]))}, expected {expected}"
            )
        self.leave_out(bad, reason)

    def finished(self) -> list[Window]:
        """Return the windows without the marked rows."""
        return [self._finished(here, order, delivery) for here, order, _, delivery in self.windows]

    def _finished(self, here: slice, order: np.ndarray | None, delivery: _Delivery) -> Window:
        window = delivery.window()
        if self.reasons is None:
            return window
        reasons = self.reasons[here] if order is None else self.reasons[here][order]
        good_rows = reasons == GOOD
        if self.readable is not None:
            good_rows = good_rows[self.readable[here] if order is None else self.readable[here][order]]
        good = window.take(np.flatnonzero(good_rows))
        good.reasons = reasons
        good.good_before = np.concatenate([[0], np.cumsum(reasons == GOOD)])
        return good

    def _readable(self) -> np.ndarray | None:
        """Return bool [scheduled], None if all rows are read. Others are marked."""
        if all(source.group.is_read for source in self.sources):
            return None
        why = [GOOD] * len(self.sources)
        for number, source in enumerate(self.sources):
            if source.group.outside:
                why[number] = REASONS.index("where")
            elif source.group.error is not None:
                if not self.decoder.skip_bad_rows:
                    raise DataError(source.group.error)
                why[number] = REASONS.index("corrupt_row_group")
        self.reasons = np.repeat(why, [source.span.stop - source.span.first for source in self.sources]).astype(
            np.uint8
        )
        return self.reasons == GOOD

    def where(self, row: int) -> str:
        """Return the file, row group and row of a decoded row as text."""
        row = row if self.numbers is None else int(self.numbers[row])
        for source in self.sources:
            rows = source.span.stop - source.span.first
            if row < rows:
                return f"{self.decoder.groups.where(source.span.group)} row {source.span.first + row}"
            row -= rows
        raise AssertionError("row is past the chunk")
