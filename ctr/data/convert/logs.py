"""Any log in parquet -> a prepared data set whose rows have the histories of their users.

The rows are grouped by user and then sorted by time through files beside the output, a part at a time: memory is about
`HistoryRule.memory_bytes`, or what the rows of the user, or of the hour, with most of them take. The disk holds the
rows with their histories once more meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from pyarrow import types

from tessera.ctr.data import columns
from tessera.ctr.data.convert.histories import HAS_KEY, KEY, PLACE, SECONDS, HistoryRule, features, with_histories
from tessera.ctr.data.convert.output import PartsWriter, Writing, complete_folder, write_description
from tessera.ctr.data.convert.spill import MOST, Spill
from tessera.ctr.data.convert.split import SECONDS_PER_HOUR, HourCounts, Splitter, by_day, by_time
from tessera.ctr.data.counter_random import mix64
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.schema import nearest
from tessera.embedding.errors import ConfigError

BATCH_ROWS = 65536
FOLDER = "__folder"
SORTING = 4  # copies of a part while it is sorted
SPILL = ".histories"


@dataclass(frozen=True)
class Log:
    """Files of rows, each with the folder that its rows go to; "" where a split decides."""

    files: list[tuple[str, Path]]

    @property
    def folders(self) -> list[str]:
        return list(dict.fromkeys(folder for folder, _ in self.files))


def log_of(paths: Sequence[Path], *, kept: bool) -> Log:
    """Return the parquet files of files and folders, in the order of their names. kept: the folders below the one
    given are those of the output. Raises DataError: something that is not there, or no file."""
    found: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_file():
            found.append(("", path))
        elif path.is_dir():
            found += [(one.parent.name if one.parent != path else "", one) for one in sorted(path.glob("**/*.parquet"))]
        else:
            raise DataError(f"{path}: found nothing, expected a parquet file or a folder of them")
    if not found:
        raise DataError(f"{paths[0]}: no file *.parquet found, expected at least one")
    if kept and any(not folder for folder, _ in found):
        raise ConfigError("--split kept: found files that lie in no folder, expected a folder with train, valid, test")
    return Log([(folder if kept else "", path) for folder, path in found])


def convert_log(
    paths: Sequence[Path], output: Path, rule: HistoryRule, how: str, valid: float, test: float, writing: Writing,
    *, overwrite: bool = False, labels: Sequence[str] = ("label",),
) -> dict:  # fmt: skip
    """Write the rows of parquet files with their histories; returns the summary written to prepare.json.

    how: "time", "day" or "kept" (the input's folders). Raises DataError, SchemaError (columns), ConfigError.
    """
    if how not in ("time", "day", "kept"):
        raise ConfigError(
            f"--split: found {how!r}, expected time, day or kept: rows split at random would show the events and "
            "labels of test rows in the histories of training rows"
        )
    log = log_of(paths, kept=how == "kept")
    with complete_folder(output, list(paths), overwrite=overwrite) as folder:
        stored = pq.read_schema(log.files[0][1])
        summary = add_histories(log, folder, rule, how, (valid, test), writing)
        write_description(folder, _schema(paths, log.files[0][1], stored, rule, labels), {"kind": "parquet"} | summary)
    return summary


def add_histories(
    log: Log, folder: Path, rule: HistoryRule, how: str, fractions: tuple[float, float], writing: Writing
) -> dict:
    """Write the rows of `log` with histories below `folder`, each folder's in order of time; returns rows by folder,
    `ties` and what made them."""
    stored = pq.read_schema(log.files[0][1])
    _check_columns(log, stored, rule)
    spill = folder / SPILL
    spill.mkdir()
    hours = HourCounts({})
    users = Spill(spill / "users", _parts(_bytes(log), rule, "users"))
    for batch in _batches(log, stored, rule, hours):
        users.scatter(
            batch, (mix64(batch.column(KEY).to_numpy().view(np.uint64).copy()) % users.count).astype(np.int64)
        )
    split = by_day(SECONDS) if how == "day" else None
    if how == "time":
        split = by_time(SECONDS, *hours.cuts(*fractions))
    edges = _edges(hours, rule, _bytes(log) + sum(hours.counts.values()) * 8 * len(rule.columns) * rule.length)
    sorted_rows, ties = Spill(spill / "hours", len(edges) + 1), 0
    for number in range(users.count):
        if (part := users.take(number)) is not None:
            pieces, tied = with_histories(part, rule)
            ties += tied
            for piece in pieces:
                sorted_rows.scatter(piece, np.searchsorted(edges, piece.column(SECONDS).to_numpy(), side="right"))
    writer = PartsWriter(folder, writing)
    for number in range(sorted_rows.count):
        if (part := sorted_rows.take(number)) is not None:
            order = np.lexsort((part.column(PLACE).to_numpy(), part.column(SECONDS).to_numpy()))
            _write(writer, part.take(pa.array(order)), split, log.folders)
    writer.close()
    shutil.rmtree(spill)
    files = {name or "all": [str(path) for one, path in log.files if one == name] for name in log.folders}
    made = {"by": rule.by, "length": rule.length, "columns": list(rule.columns), "where": rule.where}
    return {"files": files, "rows": writer.rows, "history": made, "ties": ties, "dropped": 0, "bad_rows": {}}


def _write(writer: PartsWriter, part: pa.Table, split: Splitter | None, folders: list[str]) -> None:
    plain = part.drop_columns([KEY, HAS_KEY, SECONDS, PLACE, FOLDER])
    names, into = folders, part.column(FOLDER).to_numpy()
    if split is not None:
        names, into = split(part, part.column(PLACE).to_numpy())
    for number, name in enumerate(names):
        here = np.flatnonzero(into == number)
        if len(here):
            writer.append(name, plain if len(here) == len(into) else plain.take(pa.array(here)))


def _batches(log: Log, stored: pa.Schema, rule: HistoryRule, hours: HourCounts) -> Iterator[pa.Table]:
    """Yield all rows in order, with what groups and sorts them beside them."""
    place = 0
    for folder, path in log.files:
        row = 0
        for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS):
            table = pa.Table.from_batches([batch]).select(stored.names).cast(stored).combine_chunks()
            seconds, there = columns.seconds(_array(table, rule.time), rule.time_unit)
            if there is not None:
                at = row + int(np.flatnonzero(~there)[0])
                raise DataError(f"{path} row {at}: column {rule.time!r} found null, expected a time: it orders events")
            key, known, _ = columns.ids(_array(table, rule.by), "string")
            hours.add(seconds)
            known = np.ones(len(key), bool) if known is None else known
            made: dict[str, Any] = {
                KEY: np.where(known, key, 0).astype(np.int64),
                HAS_KEY: known,
                SECONDS: seconds,
                PLACE: np.arange(place, place + len(key)),
                FOLDER: np.full(len(key), log.folders.index(folder), np.int32),
            }
            for name, values in made.items():
                table = table.append_column(name, pa.array(values))
            yield table
            row, place = row + len(key), place + len(key)


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return columns.plain(column.chunk(0) if column.num_chunks else pa.array([], column.type))


def _bytes(log: Log) -> int:
    """Return about what all rows take in memory: their size before compression, or 8 bytes a value."""
    total = 0
    for _, path in log.files:
        footer = pq.read_metadata(path)
        groups = [footer.row_group(number).total_byte_size for number in range(footer.num_row_groups)]
        total += max(2 * sum(groups), 8 * footer.num_rows * (footer.num_columns + 4))
    return total


def _parts(size: int, rule: HistoryRule, of: str) -> int:
    parts = max(1, -(-SORTING * size // rule.memory_bytes))
    if parts > MOST:
        needed = -(-SORTING * size // MOST >> 20) + 1
        raise ConfigError(
            f"--memory-mb: found {rule.memory_bytes >> 20}, expected at least {needed}: the log's {of} are sorted in "
            f"{MOST} parts at most"
        )
    return parts


def _edges(hours: HourCounts, rule: HistoryRule, size: int) -> np.ndarray:
    """Return the seconds at which parts of about equally many rows begin, on whole hours; without the first."""
    parts = _parts(size, rule, "hours")
    starts = np.array(sorted(hours.counts), np.int64)
    if not len(starts):
        raise DataError("no rows found, expected at least one")
    rows = np.cumsum([hours.counts[hour] for hour in starts.tolist()])
    wanted = rows[-1] * np.arange(1, parts) / parts
    return np.unique(starts[np.searchsorted(rows, wanted)]) * SECONDS_PER_HOUR


def _check_columns(log: Log, stored: pa.Schema, rule: HistoryRule) -> None:
    for _, path in log.files:
        here = pq.read_schema(path)
        for name in rule.read:
            if name not in here.names:
                raise SchemaError(f"{path}: column {name!r} not found; {nearest(name, here.names)}")
        for name in stored.names:
            if name not in here.names:
                raise SchemaError(f"{path}: column {name!r} not found, which {log.files[0][1]} has")
    taken = [rule.name(name) for name in rule.columns if rule.name(name) in stored.names]
    if taken:
        raise SchemaError(f"{log.files[0][1]}: column {taken[0]!r} is there already, expected a log without histories")
    time = stored.field(rule.time).type
    if not (types.is_integer(time) or types.is_timestamp(time) or types.is_date(time)):
        raise SchemaError(f"{log.files[0][1]}: column {rule.time!r} is {time}, expected an integer, timestamp or date")


def _schema(paths: Sequence[Path], first: Path, stored: pa.Schema, rule: HistoryRule, labels: Sequence[str]) -> dict:
    """Return the reader's block: that beside the input, or one by the types of the columns, and the histories. first:
    a file, whose lists of floats say how long they are."""
    beside = paths[0] / "schema.yaml"
    if beside.is_file():
        plain: Any = OmegaConf.to_container(OmegaConf.load(beside))
        schema: dict = plain["schema"]
    else:
        schema = {"labels": list(labels), "time": rule.time, "time_unit": rule.time_unit, "features": []}
        for field in stored:
            if field.name not in (*labels, rule.time):
                schema["features"] += _features(field, first)
    return with_features(schema, rule, stored)


def with_features(schema: dict, rule: HistoryRule, stored: pa.Schema) -> dict:
    """Return a reader's block with the histories' features at its end."""
    tables = [
        one.get("table") or one["name"]
        for one in schema["features"]
        if one.get("kind", "id") not in ("numeric", "vector")
    ]
    return schema | {"features": [*schema["features"], *features(rule, stored, tables)]}


def _features(field: pa.Field, first: Path) -> list[dict]:
    """Return the feature that a column is by its type; none for lists of floats of several lengths."""
    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    if types.is_floating(kind) or types.is_decimal(kind):
        return [{"name": field.name, "kind": "numeric"}]
    is_list = types.is_list(kind) or types.is_large_list(kind)
    item = kind.value_type if is_list or types.is_fixed_size_list(kind) else kind
    if item is not kind and types.is_floating(item):
        length = _length_of_lists(first, field.name) if is_list else kind.list_size
        return [] if length is None else [{"name": field.name, "kind": "vector", "length": length}]
    text = types.is_string(item) or types.is_large_string(item)
    return [{"name": field.name, "kind": "id" if item is kind else "ids", "dtype": "string" if text else "int"}]


def _length_of_lists(path: Path, name: str) -> int | None:
    """Return the length that all lists of a column have in the first rows of a file; None if they differ or are
    empty."""
    for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=[name]):
        lengths = pc.unique(pc.list_value_length(columns.plain(batch.column(0)))).drop_null().to_pylist()
        if lengths:
            return lengths[0] if len(lengths) == 1 and lengths[0] > 0 else None
    return None
