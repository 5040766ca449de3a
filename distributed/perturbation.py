"""Perturb the rows of a batch by what all ranks know of their gradients together."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tessera.distributed.collectives import gather
from tessera.embedding.helen import Perturbation


def perturb(perturbations: Iterable[Perturbation], rho: float, xi: float) -> None:
    """Make the perturbations of this rank's rows. Collective: one message, with a few numbers of each table."""
    made = list(perturbations)
    mine = [one.measured() for one in made]
    of_ranks = gather(torch.cat([one.flatten() for one in mine])).split([one.numel() for one in mine], 1)
    for one, own, everyone in zip(made, mine, of_ranks, strict=True):
        one.make(everyone.view(-1, *own.shape), rho, xi)
