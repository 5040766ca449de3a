"""What serving raises. Both kinds are mistakes that somebody else than this program can mend, told in one line."""

from __future__ import annotations

from tessera.embedding.errors import TesseraError


class ExportError(TesseraError):
    """Raised when a folder is no export that can be read, or what is published cannot be applied to it."""


class RowError(TesseraError):
    """Raised for rows that cannot be scored: a column lacks, or a value is none that the model can read."""
