"""Before anything imports Triton: where there is no GPU, its kernels run on the CPU under its interpreter.

Where nothing is installed, as on a machine that has a GPU, torch and Triton alone, `tessera.kernels` is kernels/ here.
"""

import gc
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator

import pytest

from tests import COMPOSED

LONGEST = ("tests/test_types.py", "tests/test_import_effects.py", "tests/ctr/train/", "tests/scripts/")

if importlib.util.find_spec("tessera") is None:
    sys.modules["tessera"] = types.ModuleType("tessera")
    sys.modules["tessera"].__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

#: Whether this process of xdist hands tests out and runs none, so that it needs no library.
HANDS_OUT = "PYTEST_XDIST_WORKER" not in os.environ and re.search(r"\s-n ?[1-9]", " ".join(sys.argv)) is not None

if not HANDS_OUT:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what the processes of this run compose; those of xdist, which begin later, find it named."""
    if COMPOSED not in os.environ:
        os.environ[COMPOSED] = tempfile.mkdtemp(prefix="tessera-composed-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(COMPOSED)))


def pytest_collection() -> None:
    """What is imported from here on is no garbage; looking for it takes a fifth of the time."""
    gc.disable()
    if not HANDS_OUT and importlib.util.find_spec("hydra") is not None:
        from tests.composing import compose_with_less_work

        compose_with_less_work()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest single tests first: none of several processes then works on alone at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


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
