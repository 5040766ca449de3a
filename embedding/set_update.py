"""The update of a set's rows in a step that learns scales: of all tables at once, in two passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.embedding.alpt import TwoPassUpdate
from tessera.embedding.optim import by_rate_and_age
from tessera.embedding.table_set import TableSet
from tessera.kernels.host_numbers import on_device
from tessera.kernels.random import ids_of_stream


class RecordsUpdate:
    """`TwoPassUpdate` of rows of a set: they are held in a store of their own between the two passes.

    rows: int64 [u], of the set, distinct but for -1, which is skipped; grads, inverse: as `DynamicTable.begin_update`;
    rates: learning rates of the tables.
    """

    def __init__(
        self, tables: TableSet, rows: Tensor, grads: Tensor, inverse: Tensor | None, rates: Sequence[float]
    ) -> None:
        self._set, self._rows, store, first = tables, rows, tables.store, tables.tables[0]
        places = torch.arange(rows.numel(), device=rows.device)
        self._places = torch.where(rows < 0, -1, places)
        self._held = store.store_for(rows.numel(), first)
        tables.changing(rows)
        self._held.store(places, store.groups_of(store.read(rows)))
        of_rows = store.tables_of(rows)
        self._update = TwoPassUpdate(self._held, self._places, self._ids_of_groups(of_rows), tables.step)
        old = tables.old(rows) if first.knows_periods and store.chunks else None
        parts, grads, inverse = by_rate_and_age(
            self._places, of_rows, old, grads, inverse, first.optimizer, list(rates)
        )
        kept = None
        if first.decay_floats:
            kept = tables.pass_step(rows, on_device(list(rates), rows.device, torch.float64))
        self._update.update(grads, inverse, parts, kept)
        self._store()
        if tables.mark:
            store.set_marks(rows, of_rows, tables.mark)

    def _ids_of_groups(self, tables: Tensor) -> list[Tensor | None]:
        """Return what the held rows, which know of one table alone, take for ids: such that random numbers are those
        of each row's own table, int64 [u] for each group."""
        ids = self._set.store.ids_of(self._rows)
        streams = self._set.streams_of_rounding()
        return [
            ids_of_stream(ids, streams[:, number][tables], streams[0, number]) if group.needs_ids else None
            for number, group in enumerate(self._held.groups)
        ]

    def gather(self, inverse: Tensor | None = None) -> Tensor:
        """Return values for the second pass, as `TwoPassUpdate.gather`."""
        return self._update.gather(inverse)

    def learn(self, grads: Tensor, inverse: Tensor | None = None) -> None:
        """Run the second pass, as `TwoPassUpdate.learn`; then values are stored."""
        self._update.learn(grads, inverse)
        self._set.changing(self._rows)
        self._store()

    def _store(self) -> None:
        held = [group.stored(self._places) for group in self._held.groups]
        self._set.store.write_groups(self._rows, held)
