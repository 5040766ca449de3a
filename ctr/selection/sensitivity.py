"""Rank fields by the gradient of the loss to their vectors, in one pass over a batch: no training.

Taylor (the first stage of SHARK, as ERASE has it), e_bf the vector of field f in row b and L_b the loss of the row:

    I_f = mean_b | <dL_b / de_bf, E[e_f] - e_bf> |

SFS, with a mask m_f = 1 that multiplies e_f in all rows:

    I_f = mean over batches of | dL / dm_f |

Both follow from two numbers per row and field, by which each vector e becomes m e + t (E[e] - e): their gradients at
m = 1 and t = 0 are <dL_b/de, e> and <dL_b/de, E[e] - e>. A row's vectors enter its own loss alone, so one pass over the
summed loss gives what a loop over single rows would. A ranking loss is the exception: there rows enter each other's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.ctr.selection.field_groups import FieldGroup, places_of
from tessera.ctr.selection.field_vectors import per_field
from tessera.distributed.collectives import sum_over_ranks


class Means:
    """The mean vector of each field at each site, over the rows of all batches."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.rows = 0

    def __call__(self, site: str, first: int, vectors: Tensor, rows: Tensor | None) -> Tensor:
        """Add a batch, of which the first `rows` rows are real; a `Change` that changes nothing."""
        real = vectors[: self.rows] if rows is None else vectors[rows < self.rows]
        total, count = real.double().sum(0), real.new_tensor(len(real), dtype=torch.float64)
        self.sums[site] = self.sums[site] + total if site in self.sums else total
        self.counts[site] = self.counts[site] + count if site in self.counts else count
        return vectors

    def of(self, site: str, like: Tensor) -> Tensor:
        """Return the means of a site, [fields, dim], of the type of `like`."""
        return (self.sums[site] / self.counts[site].clamp(min=1)).to(like)


class Probe:
    """The two numbers per row and group, as a `Change`.

    Attributes:
        masks: m, [B, groups]; shifts: t, [B, groups]; both ask for gradients.
    """

    def __init__(self, groups: Sequence[FieldGroup], means: Means | None, rows: int, like: Tensor) -> None:
        self._places, self._means = places_of(groups), means
        self.masks = torch.ones(rows, len(groups), dtype=like.dtype, device=like.device, requires_grad=True)
        self.shifts = torch.zeros_like(self.masks, requires_grad=True)

    def __call__(self, site: str, first: int, vectors: Tensor, rows: Tensor | None) -> Tensor:
        def factor(values: Tensor) -> Tensor:
            return per_field(values, self._places, first, vectors.shape[1], rows)

        if self._means is None:
            return vectors * factor(self.masks)
        return vectors * factor(self.masks) + factor(self.shifts) * (self._means.of(site, vectors) - vectors)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of a loss to masks and shifts, [B, groups] each; 0 where a tower reads a field nowhere."""
        found = torch.autograd.grad(loss, [self.masks, self.shifts], allow_unused=True)
        of_masks, of_shifts = (torch.zeros_like(self.masks) if one is None else one for one in found)
        return of_masks, of_shifts


class RatioOfSums:
    """Means of weighted values and how far they may be off, sum v / sum w, where v holds its weight w already."""

    def __init__(self, groups: int, device: torch.device) -> None:
        self._values = torch.zeros(3, groups, dtype=torch.float64, device=device)
        self._weights = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Add values [n, groups] and their weights [n]."""
        v, w = values.double(), weights.double()
        self._values += torch.stack([v.sum(0), v.square().sum(0), w @ v])
        self._weights += torch.stack([w.sum(), w.square().sum()])

    def all_reduce(self) -> None:
        """Add the other ranks' values."""
        sum_over_ranks(self._values, self._weights)

    def compute(self) -> tuple[list[float], list[float]]:
        """Return means and their standard errors, of each group. sum (v - w mean)^2 / (sum w)^2 is the variance."""
        total, squares, crossed = self._values
        weight, squared_weights = self._weights.tolist()
        mean = total / max(weight, 1e-300)
        spread = (squares - 2 * mean * crossed + mean.square() * squared_weights).clamp(min=0)
        return mean.tolist(), (spread.sqrt() / max(weight, 1e-300)).tolist()
