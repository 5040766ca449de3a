"""Parse delimited text to arrow tables, and keep for every row the number of its line.

A block of lines is parsed by arrow in one call. Only when that fails is the block halved again and again
until the bad lines are alone, so that good input costs nothing and bad input is named exactly.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from tessera.ctr.data.convert.lines import LineBlock, read_line_blocks
from tessera.ctr.data.errors import DataError, SchemaError

# Arrow takes delimiters of one byte; longer ones are replaced by this byte, which no text file holds.
UNIT_SEPARATOR = b"\x1f"
SHOWN_CHARACTERS = 80
SKIPPED_BEFORE_GIVING_UP = 1000


@dataclass(frozen=True)
class TextFormat:
    """Layout of the text.

    columns: names in the order of the file; may be empty when header is "yes". header: "yes", "no", or "auto"
    (the first line is a header if its first field is the first name in `columns`). quote None: quotes are
    text.
    """

    delimiter: str = ","
    columns: tuple[str, ...] = ()
    header: str = "auto"
    encoding: str = "utf8"
    quote: str | None = '"'
    null_values: tuple[str, ...] = ("",)


@dataclass
class BadRows:
    """Policy for rows that cannot be read: "raise" (DataError at the first), or "skip" and count."""

    policy: str = "raise"
    counts: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0

    def meet(self, path: Path, line: int, message: str) -> None:
        """Report one bad row: raise DataError or count it. `message` says what was expected and what was found."""
        message = f"{path} line {line}: {message}"
        if self.policy == "raise":
            raise DataError(message)
        self.counts[str(path)] += 1
        if self.skipped >= SKIPPED_BEFORE_GIVING_UP and self.skipped > self.rows_read:
            raise DataError(f"{message} ({self.skipped} bad rows, more than good ones: is the format right?)")

    @property
    def skipped(self) -> int:
        return sum(self.counts.values())


@dataclass
class TextTable:
    """Rows of one file: `table` with n rows and `lines` int64 [n], the line each row stood on (from 1)."""

    path: Path
    table: pa.Table
    lines: np.ndarray


def read_tables(
    path: Path,
    text: TextFormat,
    types: dict[str, pa.DataType],
    bad_rows: BadRows,
    block_bytes: int = 8 << 20,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[TextTable]:
    """Yield the columns named in `types`, with these types, a block of lines at a time.

    Raises SchemaError if the file lacks a column, DataError for a bad row under the policy "raise", for
    unreadable files, and for a file that holds no line at all.
    """
    parser = None
    for block in read_line_blocks(path, block_bytes, on_bytes):
        if parser is None:
            names, header_lines = _column_names(block, text)
            _check_columns(path, names, types)
            parser = _BlockParser(text, names, types, bad_rows)
            if header_lines:
                block = LineBlock(path, block.first_line + 1, block.data[block.data.index(b"\n") + 1 :])
        if block.data:
            yield from parser.parse(block)
    if parser is None:
        raise DataError(f"{path}: empty file, expected lines of text")


def shorten(found: str) -> str:
    """Return `found` in quotes, on one line and not longer than a line of a terminal."""
    shown = repr(found)
    return shown if len(shown) <= SHOWN_CHARACTERS else shown[: SHOWN_CHARACTERS - 4] + "...'"


def _column_names(block: LineBlock, text: TextFormat) -> tuple[list[str], bool]:
    line = block.data[: block.data.index(b"\n")].rstrip(b"\r").decode(text.encoding, "replace")
    if text.quote and len(text.delimiter) == 1:
        fields = next(csv.reader([line], delimiter=text.delimiter, quotechar=text.quote))
    else:
        fields = line.split(text.delimiter)
    fields = [name.strip() for name in fields] or [""]
    header = text.header == "yes" or (text.header == "auto" and fields[0] == text.columns[0])
    names = fields if header else list(text.columns)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SchemaError(f"{block.path} line 1: column name {twice[0]!r} found twice in the header, expected once")
    return names, header


def _check_columns(path: Path, names: Sequence[str], types: dict[str, pa.DataType]) -> None:
    for name in types:
        if name not in names:
            shown = ", ".join(names)
            raise SchemaError(f"{path}: column {name!r} not found, expected in the header: {shorten(shown)}")


class _BlockParser:
    def __init__(self, text: TextFormat, names: list[str], types: dict[str, pa.DataType], bad_rows: BadRows) -> None:
        self.text, self.names, self.bad_rows = text, names, bad_rows
        self.long_delimiter = text.delimiter.encode() if len(text.delimiter.encode()) > 1 else None
        self.parse_options = pa.csv.ParseOptions(
            delimiter=UNIT_SEPARATOR.decode() if self.long_delimiter else text.delimiter,
            quote_char=text.quote or False,
        )
        self.convert_options = pa.csv.ConvertOptions(
            column_types=types,
            include_columns=list(types),
            null_values=list(text.null_values),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        )

    def parse(self, block: LineBlock) -> Iterator[TextTable]:
        data = block.data
        if self.long_delimiter:
            data = data.replace(self.long_delimiter, UNIT_SEPARATOR)
        starts, stops = _line_bounds(data)
        lines = block.first_line + np.arange(len(starts), dtype=np.int64)
        filled = _not_blank(data, starts, stops)
        if not filled.all():
            lines, starts, stops = lines[filled], starts[filled], stops[filled]
        spans = [(0, len(lines))]
        while spans:
            first, last = spans.pop()
            if first == last:
                continue
            piece = data[starts[first] : stops[last - 1]]
            table, message = self._read(piece)
            if table is not None and table.num_rows != last - first:
                self._refuse_open_quotes(block.path, data, lines[first:last], starts[first:last], stops[first:last])
                message = f"expected one row, found {table.num_rows}: {shorten(self._decoded(piece))}"
                table = None
            if table is not None:
                self.bad_rows.rows_read += table.num_rows
                yield TextTable(block.path, table, lines[first:last])
            elif last - first == 1:
                self.bad_rows.meet(block.path, int(lines[first]), message)
            else:
                middle = (first + last) // 2
                spans += [(middle, last), (first, middle)]

    def _read(self, data: bytes) -> tuple[pa.Table | None, str]:
        """Parse the lines; return the table, or None and the reason."""
        read = pa.csv.ReadOptions(
            column_names=self.names,
            block_size=len(data),
            use_threads=False,
            encoding=self.text.encoding,
        )
        try:
            return pa.csv.read_csv(pa.py_buffer(data), read, self.parse_options, self.convert_options), ""
        except pa.ArrowInvalid as error:
            return None, self._explained(str(error).splitlines()[0], data)

    def _explained(self, message: str, data: bytes) -> str:
        """Rewrite arrow's message with the names of this file's columns."""
        width = re.search(r"Expected (\d+) columns, got (\d+)", message)
        if width:
            return (
                f"expected {width[1]} columns separated by {self.text.delimiter!r}, "
                f"found {width[2]}: {shorten(self._decoded(data))}"
            )
        value = re.search(r"In CSV column #(\d+): (?:Row #\d+: )?CSV conversion error to (.+?): (.*)", message)
        if value:
            found = re.search(r"invalid value '(.*)'", value[3])
            shown = shorten(found[1]) if found else value[3]
            return f"column {self.names[int(value[1])]!r}: expected {value[2]}, found {shown}"
        return message

    def _decoded(self, data: bytes) -> str:
        """Return the beginning of the lines as text that a person can read."""
        start = data[:1000].decode(self.text.encoding, "replace").rstrip("\r\n")
        return start.replace(self.parse_options.delimiter, self.text.delimiter)

    def _refuse_open_quotes(
        self, path: Path, data: bytes, lines: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> None:
        """Raise DataError for a quote that is open at the end of its line, whatever the policy: it swallows rows that
        cannot be told apart."""
        quote = (self.text.quote or '"').encode()
        for line, start, stop in zip(lines, starts, stops, strict=True):
            if data.count(quote, start, stop) % 2:
                found = shorten(self._decoded(data[start:stop]))
                raise DataError(
                    f"{path} line {line}: expected every quote {self.text.quote!r} closed on its line, found {found}"
                )


def _line_bounds(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the start and the stop (past its newline) of each line: int64 [lines] each."""
    stops = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    return np.concatenate((np.zeros(1, stops.dtype), stops[:-1])), stops


def _not_blank(data: bytes, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return False for lines that hold nothing but their end; arrow skips these too."""
    length = stops - starts
    characters = np.frombuffer(data, np.uint8)
    return (length > 2) | ((length == 2) & (characters[starts] != ord("\r")))
