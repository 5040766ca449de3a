"""Dropout by (seed, step, row, layer, unit): what it keeps on average, and that it does not know of ranks or pieces."""

import pytest
import torch
from torch import nn

from tessera.ctr.models.autoint import InteractingLayer
from tessera.ctr.models.dropout import Dropout, draw_masks, dropout_layers
from tessera.ctr.models.layers import ROWS_AT_ONCE, in_pieces
from tessera.embedding.errors import ConfigError

ROWS, UNITS = 2000, 50


def masks(seed: int = 1, step: int = 0, place: torch.Tensor | None = None, layers: int = 2) -> list[torch.Tensor]:
    tower = nn.ModuleList(Dropout(0.3) for _ in range(layers))
    place = torch.arange(ROWS) if place is None else place
    draw_masks(dropout_layers(tower), seed, step, place)
    return [layer(torch.ones(len(place), UNITS)) for layer in tower]


def test_kept_units_are_scaled_so_that_the_expectation_stays():
    for mask in masks():
        kept = mask != 0
        assert torch.equal(mask[kept], torch.full_like(mask[kept], 1 / 0.7))
        assert mask.mean().item() == pytest.approx(1, abs=0.01)
        for along in (0, 1):
            assert kept.float().mean(along).std() < 0.08  # no row and no unit is dropped as a whole


def test_seed_step_layer_row_and_unit_each_change_the_mask():
    first, second = (mask != 0 for mask in masks())
    others = {"layer": second, "step": masks(step=1)[0] != 0, "seed": masks(seed=2)[0] != 0}
    others |= {"row": first.roll(1, 0), "unit": first.roll(1, 1)}
    for name, other in others.items():
        agreement = (first == other).float().mean().item()
        assert agreement == pytest.approx(0.7**2 + 0.3**2, abs=0.01), name
    assert torch.equal(masks()[0], masks()[0])


def test_rows_have_their_masks_wherever_they_lie():
    whole = masks()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    for part in order.split(700):
        for mine, everyone in zip(masks(place=part), whole, strict=True):
            assert torch.equal(mine, everyone[part])


def test_pieces_of_a_batch_have_the_masks_of_the_batch():
    layer = InteractingLayer(4, 6, 2, "paper", residual=True, dropout=0.4)
    rows = torch.randn(3 * ROWS_AT_ONCE - 5, 7, 4)
    draw_masks(dropout_layers(layer), 1, 2, torch.arange(len(rows)))
    keys = layer.dropout.keys
    assert torch.equal(in_pieces(layer, rows, keys), layer(rows, keys))
    heads = [layer.dropout(torch.ones(len(rows), 7, 7), keys, head) for head in range(2)]
    assert not torch.equal(*heads)
    layer.eval()
    assert torch.equal(in_pieces(layer, rows), layer(rows))


def test_evaluation_and_none_drop_nothing():
    rows = torch.randn(5, UNITS)
    assert torch.equal(Dropout(0.5).eval()(rows), rows) and torch.equal(Dropout(0.0)(rows), rows)
    assert Dropout(0.5)(rows).eq(0).any()  # on its own, without a Network


def test_the_gradient_goes_through_what_was_kept():
    layer = Dropout(0.5)
    draw_masks([layer], 0, 0, torch.arange(6))
    rows = torch.randn(6, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    out = layer(rows)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(rows.grad != 0, out != 0)


@pytest.mark.parametrize("p", [1.0, -0.1, 2])
def test_impossible_rates_are_one_line(p):
    with pytest.raises(ConfigError, match="model.dropout is .*; expected 0 or more and less than 1"):
        Dropout(p)
