"""The dense optimizer: AdamW by its formula, groups of weights by name, and their states."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.train.optimizers import Optimizers
from tessera.embedding.errors import ConfigError

NAMES = ("mlp.0.weight", "mlp.0.bias", "head.weight", "head.bias")
GROUPS = "optimizer.dense.groups=[{pattern: '*.bias', weight_decay: 0}, {pattern: 'mlp.*', lr: 0.1}]"


def optimizers_of(*overrides: str, weights: dict | None = None) -> tuple[Optimizers, dict[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(7)
    drawn = {name: torch.randn(3, generator=generator) for name in NAMES}
    named = {name: torch.nn.Parameter(value.clone()) for name, value in (weights or drawn).items()}
    fused = SimpleNamespace(param_groups=[], step=lambda: None)
    network = SimpleNamespace(dense_parameters=lambda: named)
    config = load_config(list(overrides), "").optimizer
    return Optimizers(config, SimpleNamespace(module=network, fused_optimizer=fused)), named


def gradient(name: str, step: int) -> torch.Tensor:
    return torch.randn(3, generator=torch.Generator().manual_seed(NAMES.index(name) * 100 + step))


def steps(optimizers: Optimizers, named: dict[str, torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for name, parameter in named.items():
            parameter.grad = gradient(name, step)
        optimizers.step()


def adamw(value: torch.Tensor, name: str, lr: float, decay: float, count: int) -> torch.Tensor:
    """Algorithm 2 of arXiv 1711.05101 in float64."""
    value, mean, square = value.double(), 0.0, 0.0
    for step in range(count):
        grad = gradient(name, step).double()
        mean, square = 0.9 * mean + 0.1 * grad, 0.99 * square + 0.01 * grad**2
        scaled = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.99 ** (step + 1))) ** 0.5 + 1e-8)
        value = value - lr * scaled - lr * decay * value
    return value


def test_adamw_is_its_formula_with_rate_and_decay_of_each_group():
    keys = ["optimizer.dense.name=adamw", "optimizer.dense.weight_decay=0.3", "optimizer.dense.lr=0.01"]
    optimizers, named = optimizers_of(*keys, "optimizer.dense.beta2=0.99", GROUPS)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    steps(optimizers, named, 0, 9)
    numbers = dict(zip(NAMES, ((0.1, 0.3), (0.01, 0.0), (0.01, 0.3), (0.01, 0.0)), strict=True))
    for name, (lr, decay) in numbers.items():
        expected = adamw(before[name], name, lr, decay, 9)
        torch.testing.assert_close(named[name].detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "adamw", "adagrad"])
def test_a_state_is_by_name_and_goes_on_bit_for_bit_with_other_groups_too(kind):
    """Groups change the order in which torch numbers parameters; what was gathered stays with its weight."""
    keys = [f"optimizer.dense.name={kind}", "optimizer.dense.warmup_steps=6"]
    whole, expected = optimizers_of(*keys, GROUPS)
    steps(whole, expected, 0, 8)
    first, half = optimizers_of(*keys, GROUPS)
    steps(first, half, 0, 4)
    state = first.state()
    found = {name.removeprefix("optimizer/"): value.clone() for name, value in state.tensors.items()}
    second, rest = optimizers_of(*keys, GROUPS, weights={name: one.detach() for name, one in half.items()})
    second.take_over(found, **state.training["schedule"])
    steps(second, rest, 4, 8)
    assert all(torch.equal(rest[name], expected[name]) for name in NAMES)
    third, _ = optimizers_of(*keys)
    third.take_over(found, **state.training["schedule"])
    again = {name.removeprefix("optimizer/"): value for name, value in third.state().tensors.items()}
    assert again.keys() == found.keys() and all(torch.equal(again[key], found[key]) for key in found)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("[{pattern: head.wieght, lr: 1}]", "groups[0].pattern is 'head.wieght', which is the name of no dense weight; "
         "did you mean 'head.weight'?"),
        ("[{pattern: 'x*', lr: 1}]", "groups[0].pattern is 'x*', which is the name of no dense weight; names are "
         "mlp.0.weight, mlp.0.bias"),
        ("[{pattern: '*'}, {pattern: 'head*'}]", "groups[1].pattern is 'head*', and groups before it have head.weight"),
        ("[{pattern: '*', lr: 0}]", "groups[0].lr is 0.0; expected"),
        ("[{pattern: '*', weight_decay: -1}]", "groups[0].weight_decay is -1.0; expected at least 0"),
        ("[{patern: '*'}]", "unknown key 'patern'; did you mean 'pattern'?"),
    ],
)  # fmt: skip
def test_a_group_that_means_nothing_is_one_line(groups, said):
    with pytest.raises(ConfigError) as error:
        optimizers_of(f"optimizer.dense.groups={groups}")
    assert said in str(error.value) and "\n" not in str(error.value)
