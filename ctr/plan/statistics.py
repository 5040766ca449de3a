"""What a plan must know of a data set: ids per row and distinct ids of each table, from a sample or from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.plan.spectrum import Spectrum, spectrum_of
from tessera.embedding.errors import ConfigError, did_you_mean

VERSION = 1
MOST = 1e18  # of what is counted in a file of statistics, far above any data set


@dataclass(frozen=True)
class TableStatistics:
    """ids: of one row, those of all features that are looked up in the table; in_batch: the spectrum of a batch, mean
    of those that were read; in_sample: of all rows that were read, together."""

    ids: float
    in_batch: Spectrum
    in_sample: Spectrum

    def distinct(self, rows: float) -> float:
        """Return the expected number of distinct ids in so many rows of one batch, or more."""
        if rows <= self.in_batch.rows:
            return self.in_batch.distinct(rows)
        return max(self.in_sample.distinct(rows), self.in_batch.total)


@dataclass(frozen=True)
class Statistics:
    """rows: of the whole data set, or as many as a run reads. tables: by name."""

    rows: int
    tables: dict[str, TableStatistics]

    def method(self) -> str:
        """Return in one sentence where figures of distinct ids come from."""
        if not self.tables:
            return "there are no tables"
        table = next(iter(self.tables.values()))
        return (
            f"distinct ids follow from how many of a batch's {table.in_batch.rows:,} rows hold each id; those of more "
            f"rows from all {table.in_sample.rows:,} that were read; beyond these they are a guess"
        )

    def to_file(self, path: Path) -> None:
        """Write them as JSON."""
        lines = [
            f"  {json.dumps(name)}: {{\n"
            f'    "ids_per_row": {table.ids:.6g},\n'
            f'    "in_batch": {_plain(table.in_batch)},\n'
            f'    "in_sample": {_plain(table.in_sample)}\n  }}'
            for name, table in self.tables.items()
        ]
        head = f'{{\n "version": {VERSION},\n "rows": {self.rows},\n "tables": {{\n'
        path.write_text(head + ",\n".join(lines) + "\n }\n}\n")


def from_file(path: Path, schema: Schema) -> Statistics:
    """Return the statistics of a file for the tables of a schema.

    Raises ConfigError: no such file, another form, or a table of the schema that it does not have.
    """
    try:
        found = json.loads(path.read_text())
        assert found["version"] == VERSION
        tables = {
            name: TableStatistics(
                _number(table["ids_per_row"]), _spectrum(table["in_batch"]), _spectrum(table["in_sample"])
            )
            for name, table in found["tables"].items()
        }
        read = Statistics(_rows(found["rows"]), tables)
    except OSError as error:
        raise ConfigError(f"--statistics {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise ConfigError(
            f"--statistics {path} is not of the form that --write-statistics of this version writes"
        ) from None
    for name in schema.tables:
        if name not in tables:
            hint = did_you_mean(name, tables, f"it has {', '.join(tables) or 'none'}")
            raise ConfigError(f"--statistics {path} knows nothing of table {name!r}{hint}")
    return read


def from_data(reader: ParquetReader, schema: Schema, batches: int) -> Statistics:
    """Read the first batches of the reader's first epoch and return their statistics.

    Raises DataError: there are no rows, or something is wrong with the files.
    """
    read = list(islice(reader.epoch(0), batches))
    if not read:
        raise DataError(f"{reader.groups.files[0].path}: no rows to plan with")
    return from_batches(read, schema, reader.rows)


def from_batches(read: list[Batch], schema: Schema, rows: int) -> Statistics:
    """Return the statistics of whole batches, as one rank alone reads them. rows: of the data set."""
    whole = [batch for batch in read if batch.rows == read[0].rows]  # not the short one at the end of the data
    tables = {name: _of_table(read, whole, schema, features) for name, features in schema.tables.items()}
    return Statistics(rows, tables)


def _of_table(read: list[Batch], whole: list[Batch], schema: Schema, features: Iterable[str]) -> TableStatistics:
    places = [list(schema.id_names).index(name) for name in features]
    held = [_rows_and_ids(batch, places) for batch in read]
    counts = {id(batch): _rows_by_id(*one) for batch, one in zip(read, held, strict=True)}
    first = np.cumsum([0, *(batch.rows for batch in read)])
    rows = np.concatenate([one[0] + begin for one, begin in zip(held, first[:-1], strict=True)])
    together = _rows_by_id(rows, np.concatenate([one[1] for one in held]))
    return TableStatistics(
        ids=len(rows) / int(first[-1]),
        in_batch=spectrum_of(whole[0].rows, [counts[id(batch)] for batch in whole]),
        in_sample=spectrum_of(int(first[-1]), [together]),
    )


def _rows_and_ids(batch: Batch, places: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the id of each look-up in a table, int64 [n] each. places: of its features."""
    lengths = batch.ids.lengths().view(-1, batch.ids.stride()).numpy()
    ends, values = batch.ids.offset_per_key(), batch.ids.values().numpy()
    rows = [np.repeat(np.arange(lengths.shape[1]), lengths[place]) for place in places]
    return np.concatenate(rows), np.concatenate([values[ends[place] : ends[place + 1]] for place in places])


def _rows_by_id(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return for each distinct id how many rows hold it, int64 [distinct]; a row may name an id more than once."""
    if not len(ids):
        return np.zeros(0, np.int64)
    distinct, number = np.unique(ids, return_inverse=True)
    stride = int(rows.max()) + 1
    return np.bincount(np.unique(number * stride + rows) // stride, minlength=len(distinct))


def _plain(spectrum: Spectrum) -> str:
    pairs = ", ".join(f"[{times:.6g}, {count:.6g}]" for times, count in spectrum.ids.items())
    return f'{{"rows": {spectrum.rows}, "ids_in_so_many_rows": [{pairs}]}}'


def _spectrum(plain: dict[str, Any]) -> Spectrum:
    ids = {_number(times): _number(count) for times, count in plain["ids_in_so_many_rows"]}
    rows = _rows(plain["rows"])
    if ids and not 0 < min(ids) <= max(ids) <= rows:
        raise ValueError("an id in more rows than there are")
    return Spectrum(rows, ids)


def _number(plain: Any) -> float:
    """Return a number of a file as float. Raises ValueError, TypeError: it is none that counts something."""
    if isinstance(plain, bool) or not 0 <= plain <= MOST:
        raise ValueError(f"{plain} is no count")
    return float(plain)


def _rows(plain: Any) -> int:
    if _number(plain) < 1 or plain != int(plain):
        raise ValueError(f"{plain} is no number of rows")
    return int(plain)
