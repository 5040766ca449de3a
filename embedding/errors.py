"""Typed errors for mistakes a user can mend; `scripts/` print them as one line and exit with status 2."""


class TesseraError(Exception):
    """A mistake in input or configuration. The message is one line: what was found, where, what was expected."""


class ConfigError(TesseraError):
    """A configuration key has a value that cannot work, or a key is not known."""


class TableFull(TesseraError):
    """A table is at its limit and may not, or cannot, give up enough rows for the ids of one batch."""


class CacheFull(TesseraError):
    """The cache of a table does not hold the rows of two batches in a row."""
