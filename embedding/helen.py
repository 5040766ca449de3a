"""Helen's perturbation of the rows of one batch (arXiv 2403.00798, WWW 2024).

    |g|    = the norm of the gradient of one group of a table over all rows that the batch touches, on all ranks
    f_id   = max(n_id / max over the table's n, xi)        n_id: how often the global batch has the id
    eps_id = rho f_id g_id / (|g| + 1e-12)

Frequent ids end in sharp minima, so they are moved further. The gradient with which rows are updated is that at
w + eps. Only rows of the batch are looked at, so regularisers of rows that it does not touch are not in the norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_NORM = 1e-12  # is added to a norm, which may be 0


class Perturbation:
    """eps of the rows of one batch in tables of one layout on one rank.

    It is in float32 beside the rows, whatever their format, and is added to what is read of them; rows are never
    written with it.
    """

    def __init__(self, rows: Tensor, bounds: Tensor, grads: Tensor, counts: Tensor, dims: Sequence[int]) -> None:
        """rows: int64 [u], those of table t from bounds[t] on, -1 for an id without a row, int64 [T + 1]; grads:
        float32 [u, width]; counts: int64 [u], how often the global batch has each id; dims: columns of each group."""
        none = rows < 0
        self._grads, self._bounds, self._dims = grads.masked_fill(none.unsqueeze(1), 0.0), bounds, list(dims)
        self._counts = counts.masked_fill(none, 0).double()
        self._eps: Tensor | None = None

    def measured(self) -> Tensor:
        """Return what other ranks must know: by table the sum of squares of each group's gradient, and the largest
        count, float64 [T, groups + 1]."""
        parts = self._grads.split(self._dims, 1)
        squares = torch.stack([part.double().square().sum(1) for part in parts], 1)
        sums = torch.segment_reduce(squares, "sum", offsets=self._bounds, axis=0, unsafe=True, initial=0)
        counts = self._counts.unsqueeze(1)
        most = torch.segment_reduce(counts, "max", offsets=self._bounds, axis=0, unsafe=True, initial=0)
        return torch.cat([sums, most], 1)

    def make(self, of_ranks: Tensor, rho: float, xi: float) -> None:
        """Make eps of what all ranks have measured, float64 [ranks, T, groups + 1]."""
        norms, most = of_ranks[..., :-1].sum(0).sqrt(), of_ranks[..., -1].amax(0)
        places = torch.arange(len(self._counts), device=self._counts.device)
        tables = torch.searchsorted(self._bounds[1:], places, right=True).clamp_(max=len(norms) - 1)
        share = (self._counts / most.clamp(min=1)[tables]).clamp_(min=xi)
        factors = (rho * share.unsqueeze(1) / (norms + LEAST_NORM)[tables]).float()
        parts = self._grads.split(self._dims, 1)
        self._eps = torch.cat([part * factors[:, [group]] for group, part in enumerate(parts)], 1)

    def added_to(self, values: Tensor, inverse: Tensor | None) -> Tensor:
        """Return values + eps: float32 [u, width], or [n, width] of rows[inverse[i]]."""
        assert self._eps is not None, "perturbed before norms are known"
        return values + (self._eps if inverse is None else self._eps.index_select(0, inverse))
