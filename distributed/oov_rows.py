"""Put the learned rows of tables in the place of what owners answer for ids without a row.

An answer has one column more than a row: 1 for such an id, 0 for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.distributed.fields import OnDevice
from tessera.distributed.torchrec.answers import repeated


def with_oov(answered: Tensor, oov: Tensor) -> Tensor:
    """Map answers [n, width + 1] of one table to [n, width]. oov: its learned row, [width], or one for each, [n,
    width]. Differentiable in both."""
    return torch.addcmul(answered[:, :-1], answered[:, -1:].detach(), oov)


def with_oov_of_tables(answered: Tensor, bounds: Tensor, oov: Tensor, tables: OnDevice) -> Tensor:
    """Do `with_oov` for the answers of several tables, those of the k-th from bounds[k] on, int64 [k + 1].

    oov: [all tables, width]; tables: the number of each. On a GPU there may be answers behind the last bound, and
    nothing waits."""
    if answered.device.type == "cpu":
        of_tables = zip(answered.split(bounds.diff().tolist()), tables.values, strict=True)
        return torch.cat([with_oov(own, oov[table]) for own, table in of_tables])
    places = torch.arange(len(answered), device=answered.device)
    of = torch.searchsorted(bounds[1:], places, right=True).clamp_(max=bounds.numel() - 2)
    return with_oov(answered, repeated(oov, tables.on(answered.device).long()[of]))
