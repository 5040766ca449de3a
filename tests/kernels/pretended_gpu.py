"""A GPU for tests on machines without one: its tensors lie in CPU memory, but are not let near CPU tensors.

Inside `PretendedGpu`, a tensor made or moved with a CUDA device is marked, says that it is on `cuda:0`, and goes to the
Triton kernels, which the interpreter runs. What is computed of marked tensors is marked. An op of marked and unmarked
tensors raises, as it would on a GPU, and so does `numpy()`. Reading numbers of marked tensors on the host is counted:
`waits` is how often the host would have waited for a GPU (`item`, `tolist`, `int`, `bool`, `cpu`, `nonzero`, boolean
masks, and what is sent to it or from it without `non_blocking`). What a `HostCopy` reads has come if the host has
waited since the copy began; otherwise that is a wait, too.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tessera.kernels.host_numbers import HostCopy
from tessera.kernels.triton_ops import launch

GPU = torch.device("cuda", 0)
_MARK = "_on_pretended_gpu"
# Index tensors may be on the CPU, and whole tensors may be copied from there; nothing else may.
_MAY_MIX = {"__getitem__", "__setitem__", "copy_", "index_put_"}
_TO_HOST = {"cpu", "tolist", "item", "__int__", "__bool__", "__float__", "__index__", "equal", "is_nonzero"}
_WAITS = _TO_HOST | {"nonzero", "masked_select", "unique"}


def marked(tensor: torch.Tensor) -> bool:
    return getattr(tensor, _MARK, False)


def _is_gpu(device: object) -> bool:
    return device is not None and not isinstance(device, torch.dtype) and torch.device(device).type == "cuda"


def _is_mask(index: object) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(index))


class PretendedGpu(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        # Inside a launch the tensors are what they are: memory of the CPU.
        self._patch = mock.patch.object(launch, "_device", lambda tensor: torch._C.DisableTorchFunction())
        self._begun: dict[HostCopy, int] = {}  # waits before each copy
        self._patches = [
            mock.patch.object(HostCopy, "__init__", self._counted_copy(HostCopy.__init__)),
            mock.patch.object(HostCopy, "read", self._counted_read(HostCopy.read)),
        ]

    def __enter__(self):
        for patch in (self._patch, *self._patches):
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for patch in (self._patch, *self._patches):
            patch.stop()

    def _counted_copy(self, begin):
        def begin_counted(copy, numbers):
            begin(copy, numbers)
            self._begun[copy] = self.waits

        return begin_counted

    def _counted_read(self, read):
        def read_counted(copy):
            self.waits += self._begun.pop(copy, -1) == self.waits
            return read(copy)

        return read_counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return GPU if marked(args[0]) else func(*args)
        name = func.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(marked(tensor) for tensor in tensors)
        self._refuse(name, tensors, on_gpu)
        by_mask = name in ("__getitem__", "__setitem__") and _is_mask(args[1])
        self.waits += on_gpu and (name in _WAITS or by_mask)
        if name == "to":
            non_blocking, target = kwargs.pop("non_blocking", False), kwargs.pop("device", None)
            if target is None and len(args) > 1 and isinstance(args[1], (str, torch.device)):
                target, args = args[1], (args[0], *args[2:])
            if target is not None:
                self.waits += _is_gpu(target) != on_gpu and not non_blocking
                on_gpu = _is_gpu(target)
        elif "device" in kwargs:
            on_gpu = _is_gpu(kwargs["device"]) if kwargs["device"] is not None else on_gpu
            self.waits += on_gpu and name == "tensor"
            kwargs["device"] = "cpu"
        found = func(*args, **kwargs) if name != "to" or len(args) > 1 or kwargs else args[0].clone()
        if name in _TO_HOST:
            return found.clone() if isinstance(found, torch.Tensor) else found
        if on_gpu:
            tree_map_only(torch.Tensor, lambda tensor: setattr(tensor, _MARK, True), found)
        return found

    @staticmethod
    def _refuse(name: str, tensors: list[torch.Tensor], on_gpu: bool) -> None:
        if name == "numpy" and on_gpu:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if on_gpu and name not in _MAY_MIX:
            strangers = [tensor for tensor in tensors if not marked(tensor) and tensor.dim() > 0]
            if strangers:
                raise RuntimeError(
                    f"{name}: expected all tensors on cuda:0, found one {list(strangers[0].shape)} on cpu"
                )
