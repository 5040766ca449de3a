"""Store the content of rows: for every group of columns the values and the optimizer's state.

Each group has its own chunks, under row numbers that all groups share, in the form that its update kernel works on:
float32 values and state side by side (`PlainRows`), or packed rows of low precision (`packed_rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessera.embedding.config import DECAY_BYTES, DynamicTableConfig, Group
from tessera.embedding.decay import UNSEEN, DecaySum, noted_now
from tessera.embedding.decay import kept as kept_of
from tessera.embedding.packed_rows import PackedRows
from tessera.embedding.row_batch import RowBatch
from tessera.kernels.chunks import allocate_chunk, first_rows, touch_pages
from tessera.kernels.gather import gather
from tessera.kernels.initialise import InitialValues, init_rows
from tessera.kernels.optimizers import state_width
from tessera.kernels.random import stream
from tessera.kernels.reference.update import decay as decay_values
from tessera.kernels.scatter import scatter, scatter_columns
from tessera.kernels.update import update


class PlainRows:
    """One group in float32. Its methods are those of `PackedRows`, except what only low precision needs."""

    needs_ids = False

    def __init__(self, config: DynamicTableConfig, group: Group, device: torch.device) -> None:
        self._config, self._group, self._device = config, group, device
        self._width = group.dim + state_width(config.optimizer.name, group.dim)
        self.chunks: list[Tensor] = []

    def grow(self) -> None:
        """Reserve one more chunk."""
        self.chunks.append(allocate_chunk((self._config.chunk_rows, self._width), torch.float32, self._device))

    def initialise(self, rows: Tensor, ids: Tensor, first: Tensor | None) -> None:
        if first is not None:
            n, start = rows.numel(), self._config.optimizer.initial_accumulator
            state = torch.full((n, self._width - self._group.dim), start, device=self._device)
            self.write(rows, first.expand(n, -1), state, None)
            return
        initial = InitialValues("normal", 0.0, self._group.init_std, self._config.optimizer.initial_accumulator)
        drawn = stream(self._config.seed, self._config.key(self._group))
        init_rows(self.chunks, rows, ids, self._group.dim, initial, stream=drawn)

    def gather(self, rows: Tensor, inverse: Tensor | None) -> Tensor:
        return gather(self.chunks, rows, self._group.dim, inverse)

    def update(
        self,
        rows: Tensor,
        grads: Tensor,
        inverse: Tensor | None,
        lr: float,
        ids: Tensor | None,
        step: int,
        kept: Tensor | None = None,
    ) -> None:
        """Apply one optimizer step; kept: float32 [u], the part of its values that a row keeps before it."""
        optimizer = self._config.optimizer
        if kept is not None:
            values, state, _ = self.decode(self.stored(rows))
            decay_values(optimizer.name, values, state, kept, optimizer.settings(lr))
            scatter_columns(self.chunks, rows, [values, state])
        update(optimizer.name, self.chunks, rows, grads, inverse, settings=optimizer.settings(lr))

    def clear(self, rows: Tensor) -> None:
        scatter(self.chunks, rows, torch.zeros((1, self._width), device=self._device))

    def decode(self, both: Tensor) -> tuple[Tensor, Tensor, None]:
        return both[:, : self._group.dim], both[:, self._group.dim :], None

    def write(self, rows: Tensor, values: Tensor, state: Tensor, scales: Tensor | None) -> None:
        if values.dtype != torch.float32:
            # Columns of a single row count as contiguous at any address; a view as float32 needs an aligned one.
            values = values.clone(memory_format=torch.contiguous_format).view(torch.float32)
        scatter_columns(self.chunks, rows, [values, state])

    def stored(self, rows: Tensor) -> Tensor:
        """Return rows as they lie in the chunks, one tensor, for a store of the same kind elsewhere."""
        return gather(self.chunks, rows, self._width)

    def store(self, rows: Tensor, stored: Tensor) -> None:
        scatter(self.chunks, rows, stored)


class DecayNotes:
    """How far each row is decayed, as `decay.py` says. Its methods are those of a group of columns."""

    def __init__(self, config: DynamicTableConfig, floats: int, device: torch.device | str) -> None:
        self._shape, self._device = (config.chunk_rows, floats), device
        self.chunks: list[Tensor] = []

    def grow(self) -> None:
        self.chunks.append(allocate_chunk(self._shape, torch.float64, self._device))

    def clear(self, rows: Tensor) -> None:
        self.store(rows, torch.zeros((1, self._shape[1]), dtype=torch.float64, device=self._device))

    def stored(self, rows: Tensor) -> Tensor:
        return gather(self.chunks, rows, self._shape[1])

    def store(self, rows: Tensor, stored: Tensor) -> None:
        scatter(self.chunks, rows, stored)


class RowStore:
    """decay: of the table, whose rows then note how far they are decayed; None: they do not decay, or it is noted
    elsewhere."""

    def __init__(
        self, config: DynamicTableConfig, device: torch.device | str = "cpu", decay: DecaySum | None = None
    ) -> None:
        self._config = config
        self._lr = config.optimizer.lr
        self._dims = [group.dim for group in config.groups]
        self._state_widths = [sum(config.state_widths(group)) for group in config.groups]
        self._columns = [config.values_columns(group) for group in config.groups]
        self._reserved = 0
        self.bytes_per_row = config.stored_bytes
        self.groups: list[PlainRows | PackedRows] = []
        for group in config.groups:
            kind = PlainRows if config.layout(group) is None else PackedRows
            self.groups.append(kind(config, group, torch.device(device)))
        self.decay, self._notes = decay, None if decay is None else DecayNotes(config, decay.floats, device)
        if decay is not None:
            self.bytes_per_row += DECAY_BYTES * decay.floats
        #: Whether updates round at random and so must know the ids of rows.
        self.needs_ids = any(group.needs_ids for group in self.groups)

    @property
    def columns(self) -> list[PlainRows | PackedRows | DecayNotes]:
        """All that has chunks: the groups, then the notes of decay, if there are any."""
        return [*self.groups, *([] if self._notes is None else [self._notes])]

    def grow_to(self, end: int) -> None:
        """Provide memory for rows [0, end). A new chunk is not touched before its rows are."""
        while self._reserved < end:
            for group in self.columns:
                if len(group.chunks) * self._config.chunk_rows == self._reserved:  # or it grew when another could not
                    group.grow()
            self._reserved += self._config.chunk_rows

    def bytes_to_grow(self, end: int) -> int:
        """Return the bytes that `grow_to` will take, with those of the rows' places in the index."""
        chunks = -(-max(0, end - self._reserved) // self._config.chunk_rows)
        return chunks * self._config.chunk_rows * self._config.bytes_per_row

    def reserve(self, rows: int) -> None:
        """Commit the memory of rows [0, rows), none of which was written."""
        self.grow_to(rows)
        touch_pages([part for group in self.columns for part in first_rows(group.chunks, rows)])

    def initialise(self, rows: Tensor, ids: Tensor, first: Tensor | None = None) -> None:
        """Set initial values, `first` (float32 [width]) or from (seed, table, group, id) alone; initial state,
        scales."""
        parts = [None] * len(self.groups) if first is None else first.split(self._dims)
        for group, part in zip(self.groups, parts, strict=True):
            group.initialise(rows, ids, part)

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Return float32 [u, width], or [n, width] with inverse int64 [n]; row -1 gives zeros."""
        if self._notes is None or self.decay is None or not rows.numel():
            return join([group.gather(rows, inverse) for group in self.groups])
        kept = kept_of(self._notes.stored(rows), self.decay.now)
        values = join([group.gather(rows, None) for group in self.groups]) * kept[:, None]
        return values if inverse is None else values[inverse]

    def pass_step(self, rows: Tensor, lr: float | None, counts_of: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Let a step pass for the decay of all rows, of which these (int64 [u], -1 skipped) are then updated. Returns
        the part of its values that each keeps before, float32 [u]; None: rows do not decay.

        counts_of: gives how often rows were seen, this step's batch included: int64 [u]; asked where it plays a part.
        """
        if self._notes is None or self.decay is None:
            return None
        self.decay.step(self._lr if lr is None else lr)
        if not rows.numel():
            return None
        kept = kept_of(self._notes.stored(rows), self.decay.now, self.decay.before)
        self.note(rows, self.decay.now, counts_of(rows) if self.decay.floats == 2 else rows)
        return kept

    def note(self, rows: Tensor, now: float, counts: Tensor) -> None:
        """Note that rows are as they are to be at `now`, a sum of their table's, where rows decay."""
        if self._notes is not None and self.decay is not None:
            self._notes.store(rows, noted_now(now, counts, self.decay.optimizer))

    def note_new(self, rows: Tensor) -> None:
        """Note that no step has seen rows yet."""
        if self.decay is not None:
            self.note(rows, UNSEEN if self.decay.ahead else self.decay.now, torch.ones_like(rows))

    def noted(self, rows: Tensor) -> Tensor | None:
        """Return how far rows are decayed, float64 [n, 1 or 2]; None where they do not decay."""
        return None if self._notes is None else self._notes.stored(rows)

    def write_batch(self, rows: Tensor, batch: RowBatch) -> None:
        """Overwrite rows with those of a batch. Raises as `write`."""
        self.write(rows, batch.values, batch.state, batch.scale)
        if self._notes is None or self.decay is None:
            assert batch.decay is None, "rows that decay, for a table that does not"
        elif batch.decay is None:
            self.note(rows, self.decay.now, batch.count)
        else:
            self._notes.store(rows, batch.decay)

    def update(
        self,
        rows: Tensor,
        grads: Tensor,
        inverse: Tensor | None,
        lr: float | None,
        ids: Tensor | None,
        step: int,
        kept: Tensor | None = None,
    ) -> None:
        """Apply one optimizer step to rows (distinct, -1 skipped); grads float32 [n, width].

        ids int64 [u] of the rows and the table's step seed stochastic rounding; ids only where `needs_ids`. kept: what
        `pass_step` gave.
        """
        lr = self._lr if lr is None else lr
        for group, part in zip(self.groups, self.split(grads), strict=True):
            group.update(rows, part, inverse, lr, ids, step, kept)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Split [n, width] into the columns of each group."""
        return [matrix] if len(self._dims) == 1 else list(matrix.split(self._dims, dim=1))

    def clear(self, rows: Tensor) -> None:
        """Set values, state and scales to zero."""
        for group in self.columns:
            group.clear(rows)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values in storage form, state float32 [n, state_width], scales float32 [n, groups] or None.

        The order is that of the groups; the scale of a group without one is 0.
        """
        return self.decode([gather(group.chunks, rows, group.chunks[0].shape[1]) for group in self.groups])

    def decode(self, raw: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what `read` does, from rows (one tensor per group) as they lie in the chunks."""
        parts = [group.decode(rows) for group, rows in zip(self.groups, raw, strict=False)]  # notes come last
        dtype = self._config.values_dtype
        values = join([value.contiguous().view(dtype) for value, _, _ in parts])
        state = join([state for _, state, _ in parts])
        if not self._config.has_scales:
            return values, state, None
        none = values.new_zeros(len(values), dtype=torch.float32)
        return values, state, torch.stack([none if scales is None else scales for _, _, scales in parts], dim=1)

    def write(self, rows: Tensor, values: Tensor, state: Tensor, scales: Tensor | None) -> None:
        """Overwrite rows with what `read` gave. Raises ValueError for other shapes or dtypes."""
        self._check(rows, values, state, scales)
        values_of = values.split(self._columns, dim=1)
        state_of = state.split(self._state_widths, dim=1)
        scales_of = [None] * len(self.groups) if scales is None else scales.unbind(1)
        for group, *parts in zip(self.groups, values_of, state_of, scales_of, strict=True):
            group.write(rows, *parts)

    def stored(self, rows: Tensor) -> list[Tensor]:
        """Return all that is stored of rows (int64 [n], -1 gives zeros) as it lies in memory: a tensor [n, columns] per
        group, and notes of decay. A store of the same groups and optimizer, on this or another device, takes it by
        `store`."""
        return [group.stored(rows) for group in self.columns]

    def store(self, rows: Tensor, stored: list[Tensor]) -> None:
        for group, part in zip(self.columns, stored, strict=True):
            group.store(rows, part)

    def _check(self, rows: Tensor, values: Tensor, state: Tensor, scales: Tensor | None) -> None:
        name, n = self._config.name, rows.numel()
        dtype, shape = self._config.values_dtype, (n, sum(self._columns))
        if values.dtype != dtype or values.shape != shape:
            found = f"{values.dtype} {list(values.shape)}"
            raise ValueError(f"table {name}: values: expected {dtype} {list(shape)}, found {found}")
        if state.dtype != torch.float32 or state.shape != (n, sum(self._state_widths)):
            found = f"{state.dtype} {list(state.shape)}"
            raise ValueError(f"table {name}: state: expected float32 [{n}, {sum(self._state_widths)}], found {found}")
        if (scales is not None) != self._config.has_scales:
            expected = f"float32 [{n}, {len(self.groups)}]" if self._config.has_scales else "none"
            raise ValueError(f"table {name}: scale: expected {expected}, found {'none' if scales is None else 'some'}")
        if scales is not None and (scales.dtype != torch.float32 or scales.shape != (n, len(self.groups))):
            found = f"{scales.dtype} {list(scales.shape)}"
            raise ValueError(f"table {name}: scale: expected float32 [{n}, {len(self.groups)}], found {found}")


def join(parts: list[Tensor]) -> Tensor:
    """Concatenate the columns of all groups."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
