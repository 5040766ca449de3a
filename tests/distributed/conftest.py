import pytest
import torch.distributed as dist

from tests.distributed.saved_tables import alone


@pytest.fixture
def process():
    """A job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield alone()
    dist.destroy_process_group()
