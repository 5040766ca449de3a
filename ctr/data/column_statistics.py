"""Statistics of each column of a data set, and how far two sets differ: one pass over the files, in bounded memory.

Mean, deviation, smallest and largest value are exact. Quantiles come from at most `KEPT` values, those of the rows with
the smallest mix64 of their number, and counts of ids from at most `KEPT` ids, those with the smallest mix64: an id that
is among them at the end was so from its first row on, so each of their counts is exact (distinct sampling, Gibbons,
VLDB 2001). Columns with fewer values or ids are described exactly. The same files give the same statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import types

from tessera.ctr.data import columns
from tessera.ctr.data.arrow_types import plain_type
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import DataFile, one_line
from tessera.ctr.data.footers import is_list, is_number, is_text, is_whole, value_type
from tessera.ctr.data.vocabularies import ValueCounts
from tessera.kernels.mix import mix64

VERSION = 1
KEPT = 1 << 16
QUANTILES = 1000  # of a column, beside its smallest value
BATCH_ROWS = 1 << 16
COUNTS = (2, 5, 10, 20, 50, 100)  # least occurrences of which the ids are counted
BINS = 10  # of the population stability index


class NumberStatistics:
    """Numbers of one column, those of lists among them."""

    def __init__(self) -> None:
        self.count, self.not_finite = 0, 0
        self.mean, self._squares = 0.0, 0.0
        self.low, self.high = np.inf, -np.inf
        self._keys: np.ndarray = np.zeros(0, np.uint64)
        self._values: np.ndarray = np.zeros(0)

    def add(self, values: np.ndarray, places: np.ndarray) -> None:
        """Add values float64 [n]; places: int64 [n], of each in the column."""
        finite = np.isfinite(values)
        self.not_finite += int((~finite).sum())
        values, places = values[finite], places[finite]
        if not len(values):
            return
        count, mean = self.count + len(values), values.mean()
        # The sums of two parts, as Chan, Golub and LeVeque join them: no difference of large squares.
        apart = mean - self.mean
        self._squares += np.square(values - mean).sum() + apart**2 * self.count * len(values) / count
        self.mean, self.count = self.mean + apart * len(values) / count, count
        self.low, self.high = min(self.low, values.min()), max(self.high, values.max())
        keys = _mixed(places)
        if len(self._keys) == KEPT:
            small = keys < self._keys.max()
            keys, values = keys[small], values[small]
        keys, values = np.concatenate([self._keys, keys]), np.concatenate([self._values, values])
        if len(keys) > KEPT:
            kept = np.argpartition(keys, KEPT)[:KEPT]
            keys, values = keys[kept], values[kept]
        self._keys, self._values = keys, values

    @property
    def std(self) -> float:
        return float(np.sqrt(self._squares / self.count))

    def described(self) -> dict[str, Any]:
        """Return what the file says of the column; nothing where it has no number."""
        found: dict[str, Any] = {"not_finite": self.not_finite} if self.not_finite else {}
        if not self.count:
            return found
        at = np.linspace(0, 1, QUANTILES + 1)
        quantiles = np.quantile(self._values, at, method="linear")
        quantiles[0], quantiles[-1] = self.low, self.high
        numbers = {"mean": float(self.mean), "std": self.std, "min": float(self.low), "max": float(self.high)}
        return found | numbers | {"quantiles_of": len(self._values), "quantiles": quantiles.tolist()}

    def shares(self, edges: np.ndarray, nulls: int) -> np.ndarray:
        """Return the share of values between edges and, last, of nulls, float64; none is 0."""
        counts = np.bincount(np.searchsorted(edges, self._values, side="right"), minlength=len(edges) + 1)
        there = counts / max(1, len(self._values)) * self.count
        whole = np.append(there, nulls) + 0.5
        return whole / whole.sum()

    def edges(self) -> np.ndarray:
        """Return the edges of bins that hold about as many values each."""
        return np.unique(np.quantile(self._values, np.arange(1, BINS) / BINS)) if self.count else np.zeros(0)


class IdStatistics:
    """Ids of one column, those of lists among them."""

    def __init__(self) -> None:
        self.count = 0
        self.keys: np.ndarray = np.zeros(0, np.uint64)  # rising
        self.counts: np.ndarray = np.zeros(0, np.int64)
        self._limit = np.uint64(2**64 - 1)

    def add(self, ids: np.ndarray) -> None:
        """Add ids int64 [n]."""
        self.count += len(ids)
        keys = _mixed(ids)
        keys, counts = np.unique(keys[keys <= self._limit], return_counts=True)
        both, place = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        summed = np.bincount(place, np.concatenate([self.counts, counts]), len(both)).astype(np.int64)
        self.keys, self.counts = both[:KEPT], summed[:KEPT]
        if len(both) > KEPT:
            self._limit = self.keys[-1]

    @property
    def of_all(self) -> float:
        """The share of all possible ids that would be among the counted ones, 1 where none was left out."""
        return 1.0 if self._limit == np.uint64(2**64 - 1) else (float(self._limit) + 1) / 2.0**64

    def described(self) -> dict[str, Any]:
        """Return what the file says of the column."""
        if not self.count:
            return {}
        frequent = {str(least): round(float((self.counts >= least).sum() / self.of_all)) for least in COUNTS}
        distinct = round(len(self.keys) / self.of_all)
        return {"distinct": distinct, "distinct_of": len(self.keys), "ids_at_least": frequent}

    def new_to(self, other: IdStatistics) -> tuple[float, float]:
        """Return the share of these ids that the other does not have, and of their occurrences."""
        limit = min(self._limit, other._limit)
        keys, counts = self.keys[self.keys <= limit], self.counts[self.keys <= limit]
        new = ~np.isin(keys, other.keys)
        return (float(new.mean()), float(counts[new].sum() / counts.sum())) if len(keys) else (0.0, 0.0)


class ColumnStatistics:
    """One column of a data set."""

    def __init__(self, stored: pa.DataType) -> None:
        self.type = str(stored)
        kind = plain_type(stored)
        self.is_list = is_list(kind)
        item = value_type(kind.value_type if self.is_list else kind)
        self.numbers = NumberStatistics() if is_number(item) else None
        self.ids = IdStatistics() if is_text(item) or (is_whole(item) and not types.is_boolean(item)) else None
        self.rows, self.nulls, self.items, self.longest = 0, 0, 0, 0

    def add(self, array: pa.Array) -> None:
        """Add the next rows."""
        self.rows += len(array)
        array = columns.plain(array)
        if types.is_dictionary(array.type):
            array = array.dictionary_decode()
        self.nulls += array.null_count
        if self.is_list:
            lengths = pc.list_value_length(array).fill_null(0)
            self.longest = max(self.longest, pc.max(lengths).as_py() or 0)
            array = array.flatten()
        first, self.items = self.items, self.items + len(array)
        if self.numbers is not None:
            values, there = columns.floats(array)
            places = np.arange(first, self.items)
            kept = slice(None) if there is None else there
            self.numbers.add(values[kept].astype(np.float64), places[kept])
        if self.ids is not None:
            text = is_text(value_type(array.type))
            ids, there, _ = columns.ids(array, "string" if text else "int")
            self.ids.add(ids.astype(np.int64) if there is None else ids[there].astype(np.int64))

    def described(self) -> dict[str, Any]:
        """Return what the file says of the column."""
        found: dict[str, Any] = {"type": self.type, "nulls": self.nulls, "null_rate": self.nulls / max(1, self.rows)}
        if self.is_list:
            found |= {"items_per_row": self.items / max(1, self.rows), "longest": self.longest}
        for part in (self.ids, self.numbers):
            found |= {} if part is None else part.described()
        return found

    def drift(self, other: ColumnStatistics) -> dict[str, Any]:
        """Return how far this column is from the same one of another set, the reference.

        psi: the population stability index, sum over bins of (p - q) ln(p / q), of ten bins that hold as many of the
        reference's values each, nulls as a bin of their own; new_ids: the share of ids that the reference does not
        have, and new_id_rows that of their occurrences.
        """
        found: dict[str, Any] = {"null_rate": other.nulls / max(1, other.rows)}
        if self.numbers is not None and other.numbers is not None and other.numbers.count and self.numbers.count:
            edges = other.numbers.edges()
            here, there = self.numbers.shares(edges, self.nulls), other.numbers.shares(edges, other.nulls)
            found["psi"] = float(((here - there) * np.log(here / there)).sum())
        if self.ids is not None and other.ids is not None and self.ids.count and other.ids.count:
            found["new_ids"], found["new_id_rows"] = self.ids.new_to(other.ids)
        return found


def statistics_of(
    files: Sequence[DataFile], counted: Mapping[str, ValueCounts] | None = None
) -> dict[str, ColumnStatistics]:
    """Read files and return the statistics of their columns by name, in the order of the first file. counted: columns
    whose values are counted meanwhile.

    Raises DataError: a file that cannot be read, or whose columns are others than those of the first.
    """
    found: dict[str, ColumnStatistics] = {}
    for file in files:
        for batch in _batches(file):
            if not found:
                found = {field.name: ColumnStatistics(field.type) for field in batch.schema}
            if set(batch.schema.names) != set(found):
                odd = sorted(set(batch.schema.names) ^ set(found))[0]
                raise DataError(f"{file.path}: column {odd!r} is not in this file and in {files[0].path}, but in one")
            for name, one in found.items():
                try:
                    one.add(batch.column(name))
                    if counted and name in counted:
                        counted[name].add(batch.column(name))
                except (pa.ArrowException, TypeError) as error:
                    raise DataError(f"{file.path}: column {name!r}: {one_line(error)}") from None
    return found


def _batches(file: DataFile) -> Iterator[pa.RecordBatch]:
    try:
        with file.open() as parquet:
            yield from parquet.iter_batches(BATCH_ROWS, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: cannot be read: {one_line(error)}") from None


def _mixed(ids: np.ndarray) -> np.ndarray:
    return mix64(torch.from_numpy(np.array(ids, np.int64))).numpy().view(np.uint64)
