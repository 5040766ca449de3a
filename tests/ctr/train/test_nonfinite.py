"""What the guard queues on a GPU: an assertion that says what is not finite. On the CPU it raises at once."""

from __future__ import annotations

import pytest
import torch

from tessera.ctr.train import nonfinite


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def on_gpu(*values: float) -> torch.Tensor:
    return torch.tensor(values).as_subclass(OnGpu)


def test_a_gpu_is_given_what_to_say():
    nonfinite.check_loss(on_gpu(1.0).sum(), None, None, {}, 3)
    with pytest.raises(RuntimeError, match="the loss of step 3 is not finite"):
        nonfinite.check_loss(on_gpu(float("nan")).sum(), None, None, {}, 3)
    nonfinite._check_rows(on_gpu(1.0, 2.0), "v", None)
    with pytest.raises(RuntimeError, match="the gradient of the id fields, group v, is not finite"):
        nonfinite._check_rows(on_gpu(1.0, float("inf")), "v", None)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, float("nan")])
    queued = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_norm", lambda grads: [on_gpu(*grad.tolist()).norm() for grad in grads])
        patch.setattr(nonfinite, "_queue", lambda finite, message: queued.append((bool(finite), message)))
        nonfinite.check_gradients({"w": parameter}, 5)
    assert queued == [(False, "the gradient of a dense parameter is not finite in step 5")]
