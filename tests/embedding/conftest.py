import pytest

from kernels.backend import available_backends, use_backend


@pytest.fixture(params=available_backends())
def backend(request):
    """Run the test once for every implementation that this machine has."""
    with use_backend(request.param):
        yield request.param
