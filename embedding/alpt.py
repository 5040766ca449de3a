"""The rows of one batch between the two passes of a step that learns scales (ALPT, arXiv 2212.05735)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.embedding.packed_rows import PackedRows
from tessera.embedding.row_store import RowStore, join


class TwoPassUpdate:
    """Rows after the optimizer step of the first pass: state is updated, new values are in float32 and not stored yet.

    Only groups with a learned scale are held; the others are stored and do not take part in the second pass. Row
    numbers are those of the batch (distinct, -1 skipped): no row may be freed meanwhile. ids: int64 [u] of the rows,
    for all groups or for each, None where a group needs none.
    """

    def __init__(self, store: RowStore, rows: Tensor, ids: Tensor | None | Sequence[Tensor | None], step: int) -> None:
        self._store, self._rows, self._step = store, rows, step
        self._ids = [ids] * len(store.groups) if ids is None or isinstance(ids, Tensor) else ids
        self._held: list[Tensor | None] = []

    def update(
        self,
        grads: Tensor,
        inverse: Tensor | None,
        rates: list[tuple[Tensor, float]],
        kept: Tensor | None = None,
    ) -> None:
        """Run the first pass: one optimizer step by gradients float32 [n, width].

        rates: disjoint parts of the rows, -1 in place of the others, and the learning rate of each. kept: float32 [u],
        the part of its values that a row keeps before the step.
        """
        for group, part, ids in zip(self._store.groups, self._store.split(grads), self._ids, strict=True):
            held: Tensor | None = None
            for rows, lr in rates:
                if isinstance(group, PackedRows) and group.learned:
                    new = torch.empty((rows.numel(), part.shape[1]), device=part.device)
                    group.update(rows, part, inverse, lr, ids, self._step, kept, new)
                    held = new if held is None else held + new  # zeros for the rows of the other part
                else:
                    group.update(rows, part, inverse, lr, ids, self._step, kept)
            self._held.append(held)

    def gather(self, inverse: Tensor | None = None) -> Tensor:
        """Return values for the second pass: the new ones, learned groups rounded to nearest with the old scales.

        float32 [u, width], or [n, width] with inverse int64 [n].
        """
        parts = []
        for group, held in zip(self._store.groups, self._held, strict=True):
            if held is None:
                parts.append(group.gather(self._rows, inverse))
            else:
                assert isinstance(group, PackedRows)
                parts.append(group.fake_quantise(self._rows, held, inverse))
        return join(parts)

    def learn(self, grads: Tensor, inverse: Tensor | None = None) -> None:
        """Run the second pass: one step on the scales by gradients of what `gather` gave; then values are stored."""
        parts = zip(self._store.groups, self._held, self._store.split(grads), self._ids, strict=True)
        for group, held, part, ids in parts:
            if held is not None:
                assert isinstance(group, PackedRows)
                group.learn_scales(self._rows, held, part, inverse, ids, self._step)
