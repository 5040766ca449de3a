"""Tessera: training of click-through-rate models on sharded embedding tables."""

from importlib import metadata


def __getattr__(name: str) -> str:
    if name == "__version__":
        return metadata.version("tessera-ctr")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
