"""Encode names of tables as names of torch modules."""

from __future__ import annotations

from urllib.parse import quote


def module_name(table: str) -> str:
    """Return the name under which torch's modules hold a table of any name. They take no dots, no empty names and none
    that is an attribute of theirs (`type`, `keys`, `forward`), so it is quoted and begins as no attribute does."""
    return "t_" + quote(table, safe=" ").replace(".", "%2E")
