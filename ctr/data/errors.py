"""Define errors about data: they name the file, the column or the row, what was found and what was expected."""

from tessera.embedding.errors import TesseraError


class DataError(TesseraError):
    """Raised when the data cannot be read or holds a value outside the contract."""


class SchemaError(DataError):
    """Raised when the schema and the files disagree, or the schema contradicts itself."""
