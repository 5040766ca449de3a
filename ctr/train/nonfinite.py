"""Stop before an update when the loss or a gradient is not finite, and say where it began."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tessera.ctr.data.batch import Batch
from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.network import Network
from tessera.embedding.errors import TesseraError


class NonFiniteError(TesseraError):
    """Raised when loss or gradient is NaN or infinite. Nothing was updated with it and nothing saved was touched."""


def check_loss(loss: Tensor, network: Network, batch: Batch, embeddings: dict[str, Tensor], step: int) -> None:
    """Raise NonFiniteError before the backward pass. On a GPU the check is queued, see `_queue`."""
    if loss.is_cuda:
        _queue(torch.isfinite(loss), f"the loss of step {step} is not finite")
    elif not torch.isfinite(loss):
        culprit = _first_culprit(network, batch, embeddings)
        raise NonFiniteError(f"the loss of step {step} is {loss.item()}: {culprit}")


def _queue(finite: Tensor, message: str) -> None:
    """Have a GPU stop with the message before it comes to what is queued after this, if `finite` (bool []) is false.

    The host does not wait: it learns of it in a later call, and `distributed/process.py` says what it means. What
    module made the number cannot be asked any more, as the process has lost its GPU.
    """
    torch._assert_async(finite, message)


@torch.no_grad()
def _first_culprit(network: Network, batch: Batch, embeddings: dict[str, Tensor]) -> str:
    """Run the tower once more on the inputs that it had and name the first module that made a non-finite value.

    The tower alone, with this rank's rows alone: looking rows up again, or taking the statistics of batch norm over
    the global batch, would need the other ranks.
    """
    for group, emb_bfd in embeddings.items():
        if not emb_bfd.isfinite().all():
            group, field = _field_of(~emb_bfd.isfinite(), group, network)
            return f"rows of id field {field!r}, group {group!r}, are not finite"
    culprits: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all() and not culprits:
                culprits.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name or "tower")) for name, module in network.tower.named_modules()]
    norms = [module for module in network.tower.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.alone = True
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled tower calls no hooks of its modules
            network.of_tower(batch, embeddings)
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            norm.alone = False
    for name, parameter in network.tower.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name!r} is not finite; module {name.rpartition('.')[0] or 'tower'!r}"
    if norms and not culprits:
        return "this rank's rows alone give none such; rows of another rank do, by the statistics of batch norm"
    return f"module {culprits[0]!r} made the first such value" if culprits else "the tower's outputs are finite"


def watch_gradients(network: Network, embeddings: dict[str, Tensor]) -> None:
    """Check the gradients that go into the tables: their update is fused into the backward pass, after these hooks."""
    for group, emb_bfd in embeddings.items():
        if emb_bfd.requires_grad:
            emb_bfd.register_hook(lambda grad, group=group: _check_rows(grad, group, network))


def _check_rows(grad_bfd: Tensor, group: str, network: Network) -> None:
    # A sum is finite only if all terms are (overflow of a sum of finite float32 gradients is as good a reason to stop).
    finite = torch.isfinite(grad_bfd.sum())
    if grad_bfd.is_cuda:
        _queue(finite, f"the gradient of the id fields, group {group}, is not finite")
    elif not finite:
        group, field = _field_of(~grad_bfd.isfinite(), group, network)
        raise NonFiniteError(f"the gradient of id field {field!r}, group {group!r}, is not finite")


def _field_of(bad: Tensor, group: str, network: Network) -> tuple[str, str]:
    """Return group and id field of the first bad value. bad: bool [B, fields, dim], or [events, dim] of a sequence,
    whose `group` is `events_key`."""
    if bad.dim() == 2:
        group, _, name = group.partition("/")
        return group, name
    found = bad.any(2).any(0).nonzero()
    return group, network.id_names[int(found[0])] if len(found) else "?"


def check_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Raise NonFiniteError before the dense update, naming the first parameter whose gradient is not finite."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    if not gradients:
        return
    finite = torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()
    if finite.is_cuda:
        _queue(finite, f"the gradient of a dense parameter is not finite in step {step}")
    elif not finite:
        name = next(n for n, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all())
        raise NonFiniteError(f"the gradient of {name!r} is not finite in step {step}")
