"""Tessera: training of click-through-rate models on sharded embedding tables."""

import os
from importlib import metadata

# Ranks share cores with each other and with decoding threads; OpenMP workers that spin while they wait
# take those cores away (30 times slower steps were measured on two contended cores). OpenMP reads this as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> str:
    if name == "__version__":
        return metadata.version("tessera-ctr")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
