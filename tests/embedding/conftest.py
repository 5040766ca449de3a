import pytest

from tessera.kernels.backend import available_backends, use_backend

# Triton's interpreter is slow: test_gpu_tables.py is what runs on it by default.
MARKS = {"triton": [pytest.mark.slow]}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, [])) for name in available_backends()])
def backend(request):
    """Run the test once for every implementation that this machine has."""
    with use_backend(request.param):
        yield request.param
