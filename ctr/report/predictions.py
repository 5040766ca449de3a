"""Read what a run predicted: `predictions/*.parquet`, checked, by split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics.score_table import Rows, check_rows

REQUIRED = ("prediction", "label", "weight")
OPTIONAL = ("group", "split")
DEFAULT_SPLIT = "test"
# Columns of slices: of a feature (ctr/runs/slice_columns.py), and whether a row has an id that the tables lacked.
SLICE, NEW_IDS = "slice.", "new_ids"
SPLIT_OF_FILE = b"split"  # in the metadata of a file
# In the metadata of a file of several labels: label | joint | number, and the answer's place among all, from 0.
ANSWER, PLACE = b"answer", b"place"
# The main split is the first of these that exists.
PREFERRED_SPLITS = ("test", "valid", "train")


def read_predictions(folder: Path) -> dict[str, Rows]:
    """Return the rows of each split, over all files of the folder.

    The files hold prediction (probability), label (0 or 1), weight, and optionally group (integer) and split
    (string; `test` where absent). A file without a row may name the split that it is of in its metadata: a split of
    which there are such files alone has no rows.

    Raises:
        DataError: no folder, no parquet file, no rows, a missing or mistyped column, a null, NaN or value out
            of range; names the file.
    """
    parts: dict[str, list[tuple[Path, Rows]]] = {}
    files = _files(folder)
    for path in files:
        for split, rows, _ in _read_file(path):
            parts.setdefault(split, []).append((path, rows))
    if not parts:
        raise DataError(f"{folder}: {len(files)} parquet files without a row; expected at least one row")
    # Each split's parts are let go as soon as they are joined.
    return {split: _join(parts.pop(split)) for split in sorted(parts)}


def read_column(folder: Path, split: str, column: str) -> tuple[Rows, pa.ChunkedArray]:
    """Return the rows of one split, and the values of one more column for them.

    Raises:
        DataError: as `read_predictions`; also for a file without the column, or no row of that split.
    """
    parts, values = [], []
    for path in _files(folder):
        for name, rows, extra in _read_file(path, column):
            if name == split and extra is not None:
                parts.append((path, rows))
                values += extra.chunks
    if not parts:
        known = ", ".join(split_names(folder)) or "none"
        raise DataError(f"{folder}: no row of split {split}; the splits there are: {known}")
    return _join(parts), pa.chunked_array(values)


def split_names(folder: Path) -> list[str]:
    """Return the splits that have rows."""
    names: set[str] = set()
    for path in _files(folder):
        with _opened(path) as file:
            if not file.metadata.num_rows:
                continue
            if "split" not in file.schema_arrow.names:
                names.add(DEFAULT_SPLIT)
            else:
                names.update(pc.unique(file.read(["split"]).column(0).cast(pa.string())).drop_null().to_pylist())
    return sorted(names)


def slice_names(folder: Path) -> list[str]:
    """Return the columns that assign rows to slices, in the order of the first file."""
    schema = _first_schema(folder)
    return [name for name in schema.names if name == NEW_IDS or name.startswith(SLICE)]


def slice_field(folder: Path, column: str) -> pa.Field:
    """Return the field of a column in the first file with rows; its metadata says how values are shown."""
    return _first_schema(folder).field(column)


def _first_schema(folder: Path) -> pa.Schema:
    """Return the schema of the first file with a row; a rank without rows writes fewer columns."""
    schemas = []
    for path in _files(folder):
        with _opened(path) as file:
            schemas.append(file.schema_arrow)
            if file.metadata.num_rows:
                return file.schema_arrow
    return schemas[0]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected parquet files with the columns {', '.join(REQUIRED)}")
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"{folder}: no parquet file in this folder; expected at least one")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _read_file(path: Path, extra: str | None = None) -> list[tuple[str, Rows, pa.ChunkedArray | None]]:
    """Return the rows of each split of one file, with the column `extra` of the same rows."""
    with _opened(path) as file:
        present = file.schema_arrow.names
        empty_split = None if file.metadata.num_rows else (file.schema_arrow.metadata or {}).get(SPLIT_OF_FILE)
        if empty_split is not None:
            nothing = np.zeros(0, np.float32)
            return [(empty_split.decode(), Rows(nothing, nothing == 1, None, None), None)]
        for name in (*REQUIRED, *filter(None, [extra])):
            if name not in present:
                raise DataError(f"{path}: no column {name}; found {', '.join(present)}")
        table = file.read([name for name in (*REQUIRED, *OPTIONAL, extra) if name in present])
    if not table.num_rows:
        return []
    if extra is not None:  # rows that `check_rows` leaves out must go from the column, too
        table = table.filter(pc.invert(pc.equal(table["weight"], 0)), "emit_null")
    values = None if extra is None else table[extra]
    table = table if extra is None else table.drop_columns([extra])
    for name in table.column_names:
        if table[name].null_count:
            raise DataError(f"{path}: column {name} has {table[name].null_count:,} nulls; expected none")
    columns = {name: _numbers(path, name, table[name]) for name in table.column_names if name != "split"}
    if "split" not in table.column_names:
        return [(DEFAULT_SPLIT, _checked(path, columns), values)]
    splits = table["split"].cast(pa.string())
    names = pc.unique(splits).to_pylist()
    if len(names) == 1:
        return [(names[0], _checked(path, columns), values)]
    found = []
    for split in names:
        chosen = pc.equal(splits, split)
        mask = chosen.to_numpy()
        one = _checked(path, {name: column[mask] for name, column in columns.items()})
        found.append((split, one, None if values is None else values.filter(chosen)))
    return found


def _numbers(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    kind = column.type
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if not whole and (name == "group" or not pa.types.is_floating(kind)):
        raise DataError(f"{path}: column {name} is {kind}; expected {'integers' if name == 'group' else 'numbers'}")
    return column.to_numpy()


def _checked(path: Path, columns: dict[str, np.ndarray]) -> Rows:
    try:
        rows = check_rows(**columns)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    prediction = rows.prediction
    if prediction.size and (prediction.min() < 0 or prediction.max() > 1):
        found = f"{prediction.min():g} to {prediction.max():g}"
        raise DataError(f"{path}: column prediction has values from {found}; expected probabilities in [0, 1]")
    return rows


def _join(parts: list[tuple[Path, Rows]]) -> Rows:
    """Concatenate rows of several files. A weight of None stands for ones."""
    parts = [part for part in parts if len(part[1].prediction)] or parts[:1]
    (first_path, first), all_rows = parts[0], [rows for _, rows in parts]
    for path, rows in parts:
        if (rows.group is None) != (first.group is None):
            having, lacking = (path, first_path) if first.group is None else (first_path, path)
            raise DataError(f"{lacking}: no column group, which {having} has; expected all files alike")
    weight = None
    if any(rows.weight is not None for rows in all_rows):
        weights = [np.ones(len(r.prediction), np.float32) if r.weight is None else r.weight for r in all_rows]
        weight = np.concatenate(weights)
    return Rows(
        prediction=np.concatenate([rows.prediction for rows in all_rows]),
        positive=np.concatenate([rows.positive for rows in all_rows]),
        weight=weight,
        group=None if first.group is None else np.concatenate([rows.group for rows in all_rows]),
    )
