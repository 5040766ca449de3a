"""Before anything imports Triton: where there is no GPU, its kernels run on the CPU under its interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """An S3 server with an empty bucket (tests/object_store.py)."""
    from tests.object_store import object_store

    with object_store(monkeypatch) as found:
        yield found
