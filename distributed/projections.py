"""Tables of a smaller dim than the tower's: rows z_i of d_t values, projected by a learned matrix, e_i = z_i P_t with
P_t [d_t, d] (mixed-dimension embeddings, Ginart et al., arXiv 1909.11810).

Bags are pooled first: a sum of projected rows is the projection of their sum, and there are fewer bags than ids. Rows
of all tables travel in one exchange, as wide as the tower wants them, with zeros where a table has no columns.
P_t is a dense weight: every batch reads it, and ranks average its gradients as those of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.distributed.fields import OnDevice
from tessera.embedding.config import DynamicTableConfig, Group, key_of
from tessera.kernels.random import normal


def columns_in(table: DynamicTableConfig, dims: Mapping[str, int]) -> Tensor | None:
    """Return the places of a table's columns in a row of `dims` (group -> columns), int64 [width]; None if it has all
    of them."""
    places: list[int] = []
    first = 0
    for group in table.groups:
        places += range(first, first + group.dim)
        first += dims[group.name]
    return None if len(places) == first else torch.tensor(places)


def first_projection(table: DynamicTableConfig, group: Group, dim: int) -> Tensor:
    """Return the first matrix of a table's group, float32 [group.dim, dim], from (seed, table, group) alone.

    Its rows are orthogonal, each of length sqrt(dim / group.dim). So the mean square of a projected row is that of the
    row, and rows that begin at N(0, init_std) are projected to values of the same standard deviation.
    """
    key = key_of(f"{table.name}_{group.name}_projection")
    drawn = normal(table.seed, key, torch.arange(group.dim), dim).double()
    orthonormal, _ = torch.linalg.qr(drawn.t())
    matrix: Tensor = orthonormal.t() * (dim / group.dim) ** 0.5
    return matrix.float().contiguous()


@dataclass(frozen=True)
class Narrow:
    """Fields of a group whose rows have `dim` columns, and the number of the matrix of each."""

    dim: int
    fields: OnDevice
    matrices: list[int]


@dataclass(frozen=True)
class Parts:
    """A group's fields by the dim of their rows. wide: those that are not projected; order: undoes putting one part
    behind the other."""

    wide: OnDevice
    narrow: list[Narrow]
    order: OnDevice


class Projections(nn.Module):
    """The matrices of all tables whose rows are narrower than `dims`.

    Args:
        id_names: the fields, in the order of the sums.
        dims: group -> columns that the tower wants.
    """

    def __init__(self, tables: Sequence[DynamicTableConfig], id_names: Sequence[str], dims: Mapping[str, int]) -> None:
        super().__init__()
        self._narrow = [(t, group) for t in tables for group in t.groups if group.dim < dims[group.name]]
        self._dims = dict(dims)
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(g.dim, dims[g.name])) for _, g in self._narrow])
        self.restart()
        self._parts = {name: self._parts_of(name, id_names) for name in {group.name for _, group in self._narrow}}

    def _parts_of(self, name: str, id_names: Sequence[str]) -> Parts:
        by_dim: dict[int, list[tuple[int, int]]] = {}
        for matrix, (table, group) in enumerate(self._narrow):
            if group.name == name:
                by_dim.setdefault(group.dim, []).extend((id_names.index(one), matrix) for one in table.features)
        narrow = [
            Narrow(dim, OnDevice([f for f, _ in found]), [m for _, m in found]) for dim, found in sorted(by_dim.items())
        ]
        projected = [field for part in narrow for field in part.fields.values]
        wide = [field for field in range(len(id_names)) if field not in projected]
        placed = wide + projected
        return Parts(OnDevice(wide), narrow, OnDevice([placed.index(field) for field in range(len(placed))]))

    def forward(self, sums: Mapping[str, Tensor], *, frozen: bool = False) -> dict[str, Tensor]:
        """Map group -> sums over bags [B, fields, dim], zeros behind a narrow table's columns, to the same projected.

        frozen: the matrices get no gradient.
        """
        projected = dict(sums)
        for name, parts in self._parts.items():
            sums_bfd = sums[name]
            device = sums_bfd.device
            found = [sums_bfd[:, parts.wide.on(device)]] if parts.wide.values else []
            for part in parts.narrow:
                z_bfi = sums_bfd[:, part.fields.on(device), : part.dim]
                matrices_fij = torch.stack([self.weights[m] for m in part.matrices])
                matrices_fij = matrices_fij.detach() if frozen else matrices_fij
                # Not einsum, whose gradients of matrices lie otherwise in memory than data parallel wants them.
                found.append(torch.bmm(z_bfi.transpose(0, 1), matrices_fij).transpose(0, 1))
            projected[name] = torch.cat(found, 1)[:, parts.order.on(device)]
        return projected

    def named(self) -> dict[str, nn.Parameter]:
        """Return the matrices by <table>_<group>."""
        names = [f"{table.name}_{group.name}" for table, group in self._narrow]
        return dict(zip(names, self.weights, strict=True))

    @torch.no_grad()
    def restart(self) -> None:
        """Set all matrices to their first values."""
        for weight, (table, group) in zip(self.weights, self._narrow, strict=True):
            weight.copy_(first_projection(table, group, self._dims[group.name]))
