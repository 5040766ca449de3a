"""What tests of whole training jobs share."""

import pytest
import torch.distributed as dist

from tests.ctr.train.warm_ranks import WarmRanks
from tests.distributed.saved_tables import alone


@pytest.fixture
def process():
    """A job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield alone()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """Starts ranks of scripts/train.py."""
    server = WarmRanks()
    yield server
    server.close()
