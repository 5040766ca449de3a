"""Before anything imports Triton: where there is no GPU, its kernels run on the CPU under its interpreter.

Where nothing is installed, as on a machine that has a GPU, torch and Triton alone, `tessera.kernels` is kernels/ here.
"""

import gc
import importlib.util
import os
import sys
import types
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("tessera") is None:
    sys.modules["tessera"] = types.ModuleType("tessera")
    sys.modules["tessera"].__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection() -> None:
    """What is imported from here on is no garbage; looking for it takes a fifth of the time."""
    from tests.composing import parse_once

    gc.disable()
    parse_once()


def pytest_collection_finish() -> None:
    """Leave all that there is now, millions of objects, out of each later look for garbage."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """An S3 server with an empty bucket (tests/object_store.py)."""
    from tests.object_store import object_store

    with object_store(monkeypatch) as found:
        yield found
