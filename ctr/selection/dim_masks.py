"""Masks over blocks of columns of each table, which say how wide it must be (after DNIS, Cheng et al.,
arXiv 2006.04466, and AutoSrh)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tessera.ctr.models.tower import Fields
from tessera.ctr.selection.field_groups import FieldGroup
from tessera.ctr.selection.held_out import HeldOutGates
from tessera.embedding.errors import ConfigError


class DimMasks(HeldOutGates):
    """Block k of the vectors of table t is multiplied by m_tk, in every group of embeddings that has the tower's dim.

        L_valid + l1 sum |m|,   m >= 0,   m = 1 at first

    m learns on the valid split, so a block that only says what training rows have by heart loses. The paper has a mask
    for each group of ids of like frequency; here one serves all rows of a table, as they have one dim.

    Attributes:
        groups: the tables, with their pooled features.
        tables: their names.
    """

    method = "dnis"

    def __init__(
        self,
        tables: Mapping[str, Sequence[str]],
        fields: Fields,
        dims: Mapping[str, int],
        block: int,
        lr: float,
        pull: float,
    ) -> None:
        """dims: of the tower's groups of embeddings; block: columns of a block; pull: l1. Raises ConfigError: no table
        could be narrower."""
        numbers = len(fields) - len(fields.ids)
        events = {name for group in fields.sequences for name in group.ids}
        able = {name: of for name, of in tables.items() if not events & set(of)}  # others have the tower's dim
        if not able:
            raise ConfigError("selection.method is dnis, and no table has pooled features alone; none can be narrower")
        self.width, self.block = max(dims.values()), block
        if block >= self.width:
            raise ConfigError(f"selection.block is {block}; expected less than {self.width}, the dim of the tower")
        groups = [FieldGroup(tuple(of), tuple(numbers + fields.ids.index(one) for one in of)) for of in able.values()]
        super().__init__(groups, torch.ones(len(groups), -(-self.width // block)), lr)
        self.tables = tuple(able)
        self._pull, self._numbers = pull, numbers
        self._of_fields = torch.full((len(fields.ids),), len(groups))  # a row of ones for those without a mask
        for number, group in enumerate(groups):
            self._of_fields[[at - numbers for at in group.fields]] = number

    def forward(self, site: str, first: int, vectors: Tensor, rows: Tensor | None) -> Tensor:
        if first != self._numbers or rows is not None or vectors.shape[2] != self.width:
            return vectors
        assert self._now is not None  # `begin_pass` has it before the tower reads
        return vectors * self._now[self._of_fields.to(vectors.device)].to(vectors.dtype)

    def now(self) -> Tensor:
        masks = self.learned if self._leaf is None else self._leaf
        whole = torch.cat([masks, torch.ones_like(masks[:1])])
        return whole.repeat_interleave(self.block, 1)[:, : self.width]

    @torch.no_grad()
    def learn(self, gradient: Tensor) -> None:
        super().learn(gradient + self._pull)
        self.learned.clamp_(min=0)

    def importance(self) -> Tensor:
        return self.learned.mean(1)

    def dims(self, keep_above: float) -> dict[str, int]:
        """Return by table the columns of the blocks whose mask is above this share of the largest one; a block at
        least. Which blocks these are does not matter: rows of fewer columns are projected by a learned matrix."""
        kept = (self.learned > keep_above * self.learned.max()).sum(1).clamp(min=1)
        return {
            name: min(self.width, int(count) * self.block)
            for name, count in zip(self.tables, kept.tolist(), strict=True)
        }
