"""Map ids to the ranks that own them."""

from __future__ import annotations

from tessera.kernels.message import owner_of

__all__ = ["owner_of"]
