"""Typed errors for mistakes a user can mend; `scripts/` print them as one line and exit with status 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class TesseraError(Exception):
    """A mistake in input or configuration. The message is one line: what was found, where, what was expected."""


class ConfigError(TesseraError):
    """Raised for a configuration key with an invalid value, or an unknown key."""


class TableFull(TesseraError):
    """Raised when a table is at its limit and may not, or cannot, evict enough rows for the ids of one batch."""


class CacheFull(TesseraError):
    """Raised when the cache of a table cannot hold the rows of two batches in a row."""


def did_you_mean(word: object, known: Iterable[str], otherwise: str = "", form: str = "{!r}", lead: str = "; ") -> str:
    """Return the end of a message about an unknown word: the nearest of the known ones, as "; did you mean 'item'?".

    otherwise: said instead where none is near. form: how the nearest word is written. lead: stands before what is
    said; nothing is returned where there is nothing to say.
    """
    near = get_close_matches(str(word), list(known), 1)
    said = f"did you mean {form.format(near[0])}?" if near else otherwise
    return lead + said if said else ""
