import pytest
import torch

from kernels.backend import available_backends, use_backend


@pytest.fixture(params=available_backends())
def backend(request):
    """Run the test once for every implementation that this machine has."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def on_threads():
    """A function (threads, work) -> work() on that many threads."""
    before = torch.get_num_threads()

    def run(threads, work):
        torch.set_num_threads(threads)
        return work()

    yield run
    torch.set_num_threads(before)
