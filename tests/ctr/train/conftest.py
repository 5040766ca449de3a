"""What tests of whole training jobs share."""

import pytest

from tests.ctr.train.warm_ranks import WarmRanks


@pytest.fixture(scope="module")
def ranks():
    """Starts ranks of scripts/train.py."""
    server = WarmRanks()
    yield server
    server.close()
