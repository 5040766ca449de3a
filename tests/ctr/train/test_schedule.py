"""Schedules of learning rates, beside torch's own, after warm-up and in states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tessera.ctr.config import load_config
from tessera.embedding.errors import ConfigError
from tests.ctr.train.test_dense_optimizer import optimizers_of

TORCH: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda one: torch.optim.lr_scheduler.CosineAnnealingLR(one, 10, eta_min=0.02 * 0.05),
    "step": lambda one: torch.optim.lr_scheduler.StepLR(one, 10, 0.3),
    "exponential": lambda one: torch.optim.lr_scheduler.ExponentialLR(one, 0.3**0.1),
}


def rates(optimizers, count: int) -> list[tuple[float, float]]:
    found = []
    for _ in range(count):
        found.append((optimizers.dense_lr, optimizers.sparse_lr))
        optimizers.step()
    return found


@pytest.mark.parametrize("kind", TORCH)
def test_both_rates_are_those_of_torch_after_warm_up(kind):
    schedule = f"{{kind: {kind}, steps: 10, floor: 0.05{'' if kind == 'cosine' else ', factor: 0.3'}}}"
    keys = ["optimizer.dense.lr=0.02", f"optimizer.dense.schedule={schedule}", "optimizer.dense.warmup_steps=4"]
    keys += [
        "optimizer.sparse.name=rowwise_adagrad",
        "optimizer.sparse.lr=0.02",
        f"optimizer.sparse.schedule={schedule}",
    ]
    dense, sparse = zip(*rates(optimizers_of(*keys)[0], 31), strict=True)
    peer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler, expected = TORCH[kind](peer), []
    for step in range(31):
        expected.append(0.001 if kind == "cosine" and step > 10 else max(scheduler.get_last_lr()[0], 0.001))
        peer.step()
        scheduler.step()
    assert sparse == pytest.approx(expected) and dense[4:] == pytest.approx(expected[:-4])
    assert dense[:4] == pytest.approx([0.005, 0.01, 0.015, 0.02])


def test_a_schedule_goes_on_where_it_was():
    keys = ["optimizer.dense.schedule={kind: exponential, steps: 3}", "optimizer.sparse.warmup_steps=2"]
    keys += ["optimizer.sparse.schedule={kind: cosine, steps: 9}"]
    whole, _ = optimizers_of(*keys)
    expected, (half, _), (rest, _) = rates(whole, 12), optimizers_of(*keys), optimizers_of(*keys)
    assert rates(half, 5) == expected[:5]
    rest.take_over({}, **half.state().training["schedule"])
    assert rates(rest, 7) == expected[5:]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("{kind: cosine}", "steps is null, and its kind is cosine; expected a number of steps"),
        ("{steps: 5}", "steps is 5, which needs optimizer.dense.schedule.kind; it is constant"),
        ("{kind: cosine, steps: 5, factor: 0.5}", "factor is 0.5, which only step and exponential read"),
        ("{kind: cosin, steps: 5}", "kind is 'cosin'; expected constant, cosine, step or exponential"),
        ("{kind: step, steps: 5, floor: 0}", "floor is 0.0; expected a number above 0 and at most 1"),
    ],
)
def test_a_schedule_that_means_nothing_is_one_line(keys, said):
    with pytest.raises(ConfigError) as error:
        load_config([f"optimizer.dense.schedule={keys}"], "")
    assert said in str(error.value) and "\n" not in str(error.value)
