"""Choose the implementation that the ops of this package run on.

Tensors in CPU memory go to compiled C++ (`cpp`) or plain torch (`reference`), tensors on a GPU to Triton kernels
(`triton`) or plain torch. `TESSERA_KERNELS=reference` forces plain torch everywhere, `TESSERA_KERNELS=cpp` makes a
missing library an error, `TESSERA_KERNELS=triton` a missing Triton; anything else (the default) takes what is there and
current (`build_record.py`).

With `TRITON_INTERPRET=1` the Triton kernels run on the CPU, slowly, to be tested: `TESSERA_KERNELS=triton` and
`use_backend("triton")` then send CPU tensors to them too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from tessera.kernels import build_record, schemas

_choice = os.environ.get("TESSERA_KERNELS", "auto")


def _load() -> str | None:
    """Load the compiled library. Returns why it cannot be used, or None."""
    if _choice == "reference":
        return "switched off by TESSERA_KERNELS=reference"
    found = build_record.problem(torch.__version__)
    if found is None:
        library = build_record.HERE / str(build_record.read()["library"])
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            found = f"{library.name} does not load: {str(error).splitlines()[0]}"
    if _choice == "cpp" and found is not None:
        raise ImportError(f"TESSERA_KERNELS=cpp, but {found}")
    return found


def _triton_problem() -> str | None:
    if _choice == "reference":
        return "switched off by TESSERA_KERNELS=reference"
    if importlib.util.find_spec("triton") is None:
        if _choice == "triton":
            raise ImportError("TESSERA_KERNELS=triton, but triton is not installed")
        return "triton is not installed"
    return None


_library = schemas.define()
#: Why the compiled library is not in use (one line); None when it is loaded.
problem: str | None = _load()
#: Why tensors on a GPU do not go to Triton kernels (one line); None when they do.
triton_problem: str | None = _triton_problem()
if triton_problem is None:
    schemas.register_triton(_library)


def interpreted() -> bool:
    """Return True if Triton kernels can run on CPU tensors in this process, under Triton's interpreter."""
    if triton_problem is not None or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return importlib.import_module("tessera.kernels.triton_ops.launch").INTERPRETED


_on_gpu = "reference" if triton_problem else "triton"
_current = "reference" if problem else "cpp"
if _choice == "triton" and interpreted():
    _current = "triton"


def backend(device: str = "cpu") -> str:
    """Return the implementation that tensors on this kind of device get now: `cpp`, `triton` or `reference`."""
    return _on_gpu if device == "cuda" else _current


def available_backends() -> list[str]:
    """Return all implementations that CPU tensors can use in this process, the definition (`reference`) first."""
    return ["reference"] + ["cpp"] * (problem is None) + ["triton"] * interpreted()


def ops_for(tensor: torch.Tensor) -> torch._ops._OpNamespace | ModuleType | None:
    """Return the namespace of the ops for this tensor, those of `schemas.py`. None: plain torch.

    A GPU tensor goes to the Triton kernels without the way through torch's dispatcher, which would copy lists of
    chunks; a tensor that only stands for one (tracing) takes that way.
    """
    kind = tensor.device.type
    where = _on_gpu if kind == "cuda" else _current if kind in ("cpu", "meta") else "reference"
    if where == "triton" and type(tensor) in (torch.Tensor, torch.nn.Parameter) and kind != "meta":
        return importlib.import_module("tessera.kernels.triton_ops")
    return None if where == "reference" else torch.ops.tessera


def triton_for(tensor: torch.Tensor) -> ModuleType | None:
    """Return the Triton kernels if this tensor goes to them: for what only they can do, which is no op."""
    ops = ops_for(tensor)
    return None if isinstance(ops, torch._ops._OpNamespace) else ops


def check(device: torch.device | str) -> None:
    """Raise what kernels on a GPU noted since the last check: IndexError for a row or position out of range, ValueError
    for an id that was inserted twice.

    C++ and plain torch raise by themselves. Kernels on a GPU skip such numbers and go on, because to ask them would
    be to wait for them. This waits.
    """
    if backend(torch.device(device).type) == "triton":
        importlib.import_module("tessera.kernels.triton_ops").check(torch.device(device))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Switch the implementation for the whole process while the block runs (tests and benchmarks).

    `reference` holds for all devices, `cpp` for the CPU, `triton` for GPUs and, under the interpreter, for the CPU.
    Raises ValueError when `name` is not available.
    """
    global _current, _on_gpu
    known = {*available_backends(), *(["triton"] if triton_problem is None and torch.cuda.is_available() else [])}
    if name not in known:
        raise ValueError(f"kernel backend {name!r} is not available, found {sorted(known)}")
    before = _current, _on_gpu
    if name == "reference":
        _current = _on_gpu = name
    elif name == "cpp":
        _current = name
    else:
        _on_gpu = name
        _current = name if interpreted() else _current
    try:
        yield
    finally:
        _current, _on_gpu = before
