import contextlib
import os

import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tests.kernels.on_gpu import OnGpu

# Tests that take more than some seconds under Triton's interpreter; on a GPU they all run.
LONG_INTERPRETED = {
    "test_a_row_depends_on_nothing_but_its_key",
    "test_bf16_moments_keep_their_expectation",
    "test_distribution_of_normal",
    "test_erase_and_regrow",
    "test_every_part_of_the_key_matters",
    "test_growth_by_many_splits",
    "test_ids_made_to_collide_are_refused",
    "test_the_expectation_of_stochastic_rounding_is_the_value",
}
# Tests of many sizes, and those that the interpreter runs by default.
SAMPLED = {
    "test_equals_torch_optim_on_a_dense_copy": {"dim": [7]},
    "test_codes_equal_the_definition_in_float64": {"dim": [3, 64], "step": [0.01]},
    "test_pooling_equals_embedding_bag": {"dim": [21]},
    "test_gather_reads_rows": {"dim": [3, 64]},
}


def implementations():
    """What tests of ops run on: every backend for CPU tensors, and `triton-gpu`, `reference-gpu` with a GPU.

    TESSERA_PRETEND_GPU=1 adds `triton-gpu` on `pretended_gpu.py`, where the interpreter is at hand.
    """
    found = available_backends()
    if torch.cuda.is_available():
        found += ["triton-gpu", "reference-gpu"]
    elif os.environ.get("TESSERA_PRETEND_GPU") == "1" and "triton" in found:
        found += ["triton-gpu"]
    return found


@pytest.fixture(params=implementations())
def backend(request):
    """Run the test once for every implementation that this machine has."""
    name, _, gpu = request.param.partition("-")
    with contextlib.ExitStack() as stack:
        if not (gpu and name == "triton" and not torch.cuda.is_available()):
            stack.enter_context(use_backend(name))
        elif gpu:
            from tests.kernels.pretended_gpu import PretendedGpu

            stack.enter_context(PretendedGpu())
        if gpu:
            stack.enter_context(OnGpu())
        yield request.param


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is None or callspec.params.get("backend") != "triton":
            continue
        kept = SAMPLED.get(item.originalname, {})
        if item.originalname in LONG_INTERPRETED or any(callspec.params[name] not in kept[name] for name in kept):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def on_threads():
    """A function (threads, work) -> work() on that many threads."""
    before = torch.get_num_threads()

    def run(threads, work):
        torch.set_num_threads(threads)
        return work()

    yield run
    torch.set_num_threads(before)
