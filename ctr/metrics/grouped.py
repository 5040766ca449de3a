"""GAUC of a stream of batches on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ctr.metrics.exact import group_auc
from tessera.ctr.metrics.score_table import check_rows
from tessera.distributed.collectives import gather, ranks, sum_over_ranks
from tessera.kernels.mix import mix64


class StreamingGauc:
    """The exact GAUC of all rows, as `ctr/metrics/exact.py` has it, in 24 bytes of memory a row: AUC inside a group
    wants all of its rows at once. Each group is computed by one rank, to which the others send what they have of it.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, logit: Tensor, label: Tensor, weight: Tensor, group: Tensor) -> None:
        """Add a batch: logit, label of 0 and 1, weight (rows of 0 change nothing) floating [B], group int64 [B]."""
        numbers = torch.stack([torch.sigmoid(logit.float()), label.float(), weight.float()], 1)
        self._rows.append((numbers, group))

    def compute(self) -> float | None:
        """Return the mean of the AUC of groups with both classes, by their weights; None without any. Collective."""
        numbers = torch.cat([one for one, _ in self._rows]).cpu() if self._rows else torch.empty(0, 3)
        groups = torch.cat([one for _, one in self._rows]).cpu() if self._rows else torch.empty(0, dtype=torch.int64)
        self._rows = []
        counted = numbers[:, 2] > 0
        numbers, groups = numbers[counted], groups[counted]
        if ranks() > 1:
            numbers, groups = _by_owner(numbers, groups)
        score, label, weight = numbers.T.numpy()
        found = group_auc(check_rows(score, label, weight, groups.numpy())) if len(groups) else None
        mine = (found.gauc or 0.0, found.scored_weight) if found else (0.0, 0.0)
        sums = torch.tensor([mine[0] * mine[1], mine[1]], dtype=torch.float64)
        sum_over_ranks(sums)
        total, weight = sums.tolist()
        return total / weight if weight else None


def _by_owner(numbers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of all ranks whose groups this rank computes, in the order of ranks."""
    world = ranks()
    owner = mix64(groups).remainder(world)
    mine = torch.distributed.get_rank()
    kept: tuple[Tensor, Tensor] = (numbers[:0], groups[:0])
    for rank in range(world):
        own = owner == rank
        counts = gather(torch.tensor([int(own.sum())])).flatten().tolist()
        if not max(counts):
            continue
        padded_numbers, padded_groups = numbers.new_zeros((max(counts), 3)), groups.new_zeros(max(counts))
        padded_numbers[: counts[mine]], padded_groups[: counts[mine]] = numbers[own], groups[own]
        all_numbers, all_groups = gather(padded_numbers.flatten()).view(world, -1, 3), gather(padded_groups)
        if rank == mine:
            kept = (
                torch.cat([one[:count] for one, count in zip(all_numbers, counts, strict=True)]),
                torch.cat([one[:count] for one, count in zip(all_groups, counts, strict=True)]),
            )
    return kept
