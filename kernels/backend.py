"""Which implementation the ops of this package run on: compiled C++ (`cpp`) or plain torch (`reference`).

`TESSERA_KERNELS=reference` forces plain torch, `TESSERA_KERNELS=cpp` makes a missing library an error,
anything else (the default) takes the compiled library where it is there and current (`build_record.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from kernels import build_record


def _load() -> str | None:
    """Load the compiled library. Returns why it cannot be used, or None."""
    choice = os.environ.get("TESSERA_KERNELS", "auto")
    if choice == "reference":
        return "switched off by TESSERA_KERNELS=reference"
    found = build_record.problem(torch.__version__)
    if found is None:
        library = build_record.HERE / str(build_record.read()["library"])
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            found = f"{library.name} does not load: {str(error).splitlines()[0]}"
    if choice == "cpp" and found is not None:
        raise ImportError(f"TESSERA_KERNELS=cpp, but {found}")
    return found


#: Why the compiled library is not in use (one line); None when it is loaded.
problem: str | None = _load()
_current = "reference" if problem else "cpp"


def backend() -> str:
    """The implementation that CPU tensors get now: `cpp` or `reference`."""
    return _current


def available_backends() -> list[str]:
    """All implementations that can be used in this process, the definition (`reference`) first."""
    return ["reference"] if problem else ["reference", "cpp"]


def compiled_for(tensor: torch.Tensor) -> bool:
    """True if an op on this tensor goes to the compiled library."""
    return _current == "cpp" and tensor.device.type in ("cpu", "meta")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Switch the implementation for the whole process while the block runs (tests and benchmarks).

    Raises ValueError when `name` is not available.
    """
    global _current
    if name not in available_backends():
        raise ValueError(f"kernel backend {name!r} is not available, found {available_backends()}")
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before
