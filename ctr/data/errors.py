"""Define errors about data: they name the file, the column or the row, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Iterable

from tessera.embedding.errors import TesseraError, did_you_mean


class DataError(TesseraError):
    """Raised when the data cannot be read or holds a value outside the contract."""


class SchemaError(DataError):
    """Raised when the schema and the files disagree, or the schema contradicts itself."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known word that is probably meant, or all known words."""
    known = list(known)
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return did_you_mean(word, known, f"known: {shown or 'none'}", lead="")
