"""What one embedding table is, apart from where it lives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class TableConfig:
    """One table: rows of `dim` floats keyed by raw 64-bit ids.

    `features` are the id columns looked up in it. Rows start at N(0, init_std), drawn from (seed, table name, row)
    alone.
    """

    name: str
    dim: int
    features: tuple[str, ...]
    init_std: float

    @property
    def key(self) -> int:
        """A signed 64-bit number that stands for the name in the counter-based generator."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
