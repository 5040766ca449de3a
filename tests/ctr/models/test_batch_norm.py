"""Batch norm over the global batch: torch's own on one rank, the same numbers however rows are spread over ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tessera.ctr.models.batch_norm import BatchNorm
from tests.ranks import on_ranks

ROWS, CHANNELS = 12, 5
SPREADS = {  # rows of each rank, of which the last may be padding
    "one": [(12, 12)],
    "even": [(6, 6), (6, 6)],
    "padded": [(9, 9), (9, 3)],
    "a rank without rows": [(12, 12), (12, 0)],
    "one row each": [(1, 1), (1, 1)],
    "one row in all": [(1, 1), (1, 0)],
    "three": [(5, 5), (5, 5), (5, 2)],
}


def inputs(shape: tuple[int, ...] = (ROWS, CHANNELS)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator) * 3 + 2, torch.randn(shape, generator=generator)


def layer(kind: type[nn.Module]) -> nn.Module:
    norm = kind(CHANNELS)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
        norm.running_var.fill_(4.0)
    return norm


def step(norm: nn.Module, rows: torch.Tensor, pull: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = rows.clone().requires_grad_()
    out = norm(rows)
    out.backward(pull)
    of_parameters = {"weight": norm.weight.grad, "bias": norm.bias.grad}
    return {"out": out.detach(), "rows": rows.grad, **of_parameters, **dict(norm.named_buffers())}


def spread_step(process, spread, inner, bf16=False):
    """What a rank sees of a step, the gradients of its parameters summed over ranks."""
    size, real = spread[process.rank]
    first = sum(rows for _, rows in spread[: process.rank])
    given = [torch.zeros(size, CHANNELS, *inner) for _ in range(2)]
    for mine, everyone in zip(given, inputs((ROWS, CHANNELS, *inner)), strict=True):
        mine[:real] = everyone[first : first + real]
    norm = layer(BatchNorm)
    norm.real_rows = real
    if bf16:
        given = [one.bfloat16() for one in given]
    found = step(norm, *given)
    for name in ("weight", "bias"):
        dist.all_reduce(found[name])
    return {name: value[:real] if name in ("out", "rows") else value for name, value in found.items()}


def joined(spread, inner=(), bf16=False):
    results = on_ranks(len(spread), spread_step, spread, inner, bf16)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert all(torch.equal(one[name], results[0][name]) for one in results), name
    rows = {name: torch.cat([one[name] for one in results]) for name in ("out", "rows")}
    return {**results[0], **rows}


@pytest.mark.parametrize("inner", [(), (2, 3)])
@pytest.mark.parametrize("name", ["even", "padded", "a rank without rows", "three"])
def test_any_spread_of_rows_is_torch_on_all_of_them(name, inner):
    rows = sum(real for _, real in SPREADS[name])
    whole = [one[:rows] for one in inputs((ROWS, CHANNELS, *inner))]
    expected = step(layer(nn.BatchNorm2d if inner else nn.BatchNorm1d), *whole)
    for key, found in joined(SPREADS[name], inner).items():
        torch.testing.assert_close(
            found, expected[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_one_row_on_each_rank_is_a_batch_of_two():
    expected = step(layer(nn.BatchNorm1d), *(one[:2] for one in inputs()))
    for key, found in joined(SPREADS["one row each"]).items():
        torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["one row in all", "alone"])
def test_a_single_row_takes_the_running_statistics_and_leaves_them(name):
    rows, pull = (one[:1] for one in inputs())
    expected = step(layer(nn.BatchNorm1d).eval(), rows, pull)
    found = step(layer(BatchNorm), rows, pull) if name == "alone" else joined(SPREADS[name])
    for key in ("out", "rows", "weight", "bias", "running_mean", "running_var"):
        torch.testing.assert_close(found[key], expected[key])


def test_a_single_image_has_values_enough():
    rows, pull = (one[:1] for one in inputs((ROWS, CHANNELS, 2, 3)))
    expected = step(layer(nn.BatchNorm2d), rows, pull)
    for key, found in step(layer(BatchNorm), rows, pull).items():
        torch.testing.assert_close(found, expected[key])


def test_evaluation_is_torchs():
    rows, pull = inputs()
    one, other = layer(nn.BatchNorm1d).eval(), layer(BatchNorm).eval()
    other.real_rows = 3  # of the last batch in training
    expected, found = step(one, rows, pull), step(other, rows, pull)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert other.state_dict().keys() == one.state_dict().keys()


def test_bfloat16_rows_have_statistics_in_float32():
    expected = step(layer(nn.BatchNorm1d), *inputs())
    found = joined(SPREADS["even"], bf16=True)
    assert found["out"].dtype == torch.bfloat16
    torch.testing.assert_close(found["out"].float(), expected["out"], rtol=0.02, atol=0.03)
    torch.testing.assert_close(found["running_var"], expected["running_var"], rtol=0.01, atol=0)
