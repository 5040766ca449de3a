"""Run a test that was written for the CPU with its tensors on a GPU: they are made on the CPU, as always, and moved."""

import torch
from torch.overrides import TorchFunctionMode

_MAKERS = {
    *(torch.tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.rand, torch.randn),
    *(torch.randint, torch.randperm, torch.eye, torch.frombuffer),
}


class OnGpu(TorchFunctionMode):
    """Tensors made without a device are moved to the GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        return made.to("cuda") if func in _MAKERS and kwargs.get("device") is None else made
