"""ECN and the linear cross network: closed forms, and the order of the crosses that they make."""

import pytest
import torch

from tessera.ctr.models.ecn import CrossStack


def stack(layers: int, inputs: int, *, doubles: bool, heads: int = 1) -> CrossStack:
    torch.manual_seed(1)
    made = CrossStack(layers, inputs, heads, 0.0, layer_norm=True, batch_norm=False, doubles=doubles).double()
    for layer in made.layers:
        torch.nn.init.normal_(layer.weight.weight)
    return made


def test_without_weights_a_layer_multiplies_by_one_and_its_bias():
    crosses, rows = stack(3, 6, doubles=True, heads=2), torch.randn(5, 2, 6).double()
    expected = rows
    for layer in crosses.layers:
        torch.nn.init.zeros_(layer.weight.weight)
        expected = expected * (1 + layer.bias)
    torch.testing.assert_close(crosses(rows), expected)


def test_one_layer_of_both_networks_is_the_same():
    rows = torch.randn(5, 1, 6).double()
    torch.testing.assert_close(stack(1, 6, doubles=True)(rows), stack(1, 6, doubles=False)(rows))
    assert not torch.allclose(stack(2, 6, doubles=True)(rows), stack(2, 6, doubles=False)(rows))


@pytest.mark.parametrize(("doubles", "order"), [(True, 4), (False, 3)])
def test_two_exponential_layers_make_products_of_four_and_two_linear_ones_of_three(doubles, order):
    """Over two inputs the mask's layer norm sees one unit and gives 0: what is left are products alone. A polynomial of
    order n in a factor of its input has differences of order n + 1 that are 0, and those of order n that are not."""
    crosses, row = stack(2, 2, doubles=doubles), torch.tensor([[[0.7, -1.1]]]).double()
    found = torch.cat([crosses(row * factor) for factor in range(order + 2)]).squeeze(1).T  # [2, order + 2]
    assert (found.diff(order, 1).abs() > 1e-3).any()
    torch.testing.assert_close(found.diff(order + 1, 1), torch.zeros(2, 1).double(), rtol=0, atol=1e-9)
