"""What a tower costs per row and per step, counted by running it once on made-up rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.tower import Fields, Tower, drawn_inputs, logits_of

ROWS = 16


@dataclass(frozen=True)
class TowerCost:
    """flops: of matrix products and attention, forward and backward, for one row. parameters: numbers that the dense
    optimizer trains. norms: channels of each batch norm, as often as a step runs it."""

    flops: float
    parameters: int
    norms: tuple[int, ...]


def cost_of(tower: Tower, fields: Fields) -> TowerCost:
    """Return the cost of a tower over these fields, with histories as long as they may be."""
    norms: list[int] = []

    def note(norm: nn.Module, _inputs: Any, _output: Any) -> None:
        assert isinstance(norm, BatchNorm)
        norms.append(norm.num_features)

    hooks = [one.register_forward_hook(note) for one in tower.modules() if isinstance(one, BatchNorm)]
    flops = [_flops(tower, rows, fields) for rows in (ROWS, 2 * ROWS)]
    for hook in hooks:
        hook.remove()
    tower.zero_grad(set_to_none=True)
    parameters = sum(one.numel() for one in tower.parameters() if one.requires_grad)
    return TowerCost((flops[1] - flops[0]) / ROWS, parameters, tuple(norms[: len(norms) // 2]))


def _flops(tower: Tower, rows: int, fields: Fields) -> int:
    numeric, embeddings, events = drawn_inputs(tower.train(), fields, rows)
    with FlopCounterMode(display=False) as counter:
        logits_of(tower, numeric.detach(), embeddings, events).sum().backward()
    return counter.get_total_flops()
