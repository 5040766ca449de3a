"""How a GPU multiplies float32 matrices is set where a run or an evaluation begins, and put back by the Python API."""

import pytest
import torch

from tessera.ctr import api
from tessera.ctr.config import load_config
from tessera.ctr.runs.log import precision
from tessera.ctr.train.engine import prepare_device
from tessera.distributed import process as processes
from tests.distributed.saved_tables import alone

GPU = torch.device("cuda", 0)
MINIMAL = ["data=synthetic", "data.path=/nowhere"]


@pytest.fixture(autouse=True)
def flags():
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32
    yield
    matrices.allow_tf32, convolutions.allow_tf32 = before


def set_flags(*, matrices: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matrices, convolutions


def found() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def rank_on(device: torch.device):
    process = alone()
    process.device = device
    return process


@pytest.mark.parametrize(("overrides", "wanted"), [([], True), (["trainer.tf32=false"], False)])
def test_the_key_decides_on_a_gpu(overrides, wanted):
    set_flags(matrices=not wanted, convolutions=not wanted)
    prepare_device(load_config([*MINIMAL, *overrides], ""), rank_on(GPU))
    assert found() == (wanted, wanted)
    assert precision(GPU) == {"float32 matrices": "TF32" if wanted else "float32"}


def test_nothing_changes_on_a_cpu():
    set_flags(matrices=False, convolutions=True)
    prepare_device(load_config(MINIMAL, ""), rank_on(torch.device("cpu")))
    assert found() == (False, True)
    assert precision(torch.device("cpu")) == {}


def test_the_python_api_leaves_the_precision_as_it_found_it(monkeypatch):
    """After an error, too."""
    monkeypatch.setattr(processes, "start", lambda device, seconds: rank_on(GPU))
    monkeypatch.setattr(processes, "stop", lambda process: None)
    set_flags(matrices=False, convolutions=True)
    with pytest.raises(api.TesseraError, match="/nowhere"):
        api.train(load_config(MINIMAL, ""))
    assert found() == (False, True)
    with pytest.raises(ZeroDivisionError), api._process(load_config(MINIMAL, "")) as process:
        prepare_device(load_config(MINIMAL, ""), process)
        assert found() == (True, True)
        raise ZeroDivisionError
    assert found() == (False, True)
