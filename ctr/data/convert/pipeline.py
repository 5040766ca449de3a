"""Convert text to a prepared data set: read, make columns, split and write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
from omegaconf import OmegaConf
from tqdm import tqdm

from tessera.ctr.data.convert.columns import Column, make_columns, text_types
from tessera.ctr.data.convert.delimited import BadRows, TextFormat, TextTable, read_tables
from tessera.ctr.data.convert.output import PartsWriter, Writing, complete_folder, write_description
from tessera.ctr.data.convert.split import SPLITS, HourCounts, Splitter, by_day, by_fraction, by_time, into
from tessera.ctr.data.errors import DataError
from tessera.embedding.errors import ConfigError

# A row's key for the random split: the number of its file above these bits, its line below.
LINE_BITS = 40

# Fills in a TextTable: derives columns, drops rows. Keeps `lines` in step with the rows.
Transform = Callable[[TextTable], TextTable]


@dataclass(frozen=True)
class Options:
    """Options that every converter takes. bad_rows: "raise" or "skip". block_bytes: text parsed at a time."""

    overwrite: bool = False
    bad_rows: str = "raise"
    block_bytes: int = 8 << 20
    writing: Writing = field(default_factory=Writing)

    def __post_init__(self) -> None:
        if self.bad_rows not in ("raise", "skip"):
            raise ConfigError(f"bad_rows: found {self.bad_rows!r}, expected raise or skip")
        if self.block_bytes < 1:
            raise ConfigError(f"block_bytes: found {self.block_bytes}, expected at least 1")


@dataclass(frozen=True)
class Input:
    """Input files and the rule that splits their rows.

    Either `files` of named splits ({"train": [...], "valid": [...], "test": [...]}; or any folder names such
    as day=2014-10-21), or one list of files under the key "" together with `how`: "random" (valid and test
    fractions by seed), "time" (fractions at the end of the time column's range, or valid_from and test_from
    in seconds) or "day" (one folder per day).
    """

    files: dict[str, list[Path]]
    how: str = "random"
    valid: float = 0.1
    test: float = 0.1
    seed: int = 2026
    valid_from: int | None = None
    test_from: int | None = None

    def __post_init__(self) -> None:
        if self.how not in ("random", "time", "day"):
            raise ConfigError(f"split: found {self.how!r}, expected random, time or day")
        if (self.valid_from is None) != (self.test_from is None):
            raise ConfigError("valid_from and test_from: found one of them, expected both or none")
        if self.valid_from is not None and self.how != "time":
            raise ConfigError(f"valid_from: found with the split {self.how}, expected with the split time")
        for path in self.all_files:
            if not path.is_file():
                raise DataError(f"{path}: found {'a folder' if path.is_dir() else 'nothing'}, expected a file")

    @property
    def all_files(self) -> list[Path]:
        return [path for paths in self.files.values() for path in paths]


@dataclass(frozen=True)
class Conversion:
    """The parts that are specific to one kind of log. time: the stored column to split by time, if there is one."""

    kind: str
    text: TextFormat
    columns: Sequence[Column]
    schema: dict
    transform: Transform = lambda table: table
    time: str | None = None

    @property
    def split_column(self) -> str:
        """The column to split by time or day. Ask only in such a split, which needs one."""
        assert self.time is not None
        return self.time


def schema_from_conf(name: str) -> dict:
    """Return the `schema:` block of conf/data/<name>.yaml, so that it is written down in one place only."""
    text = (resources.files("tessera.conf") / "data" / f"{name}.yaml").read_text()
    whole = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(whole, dict) and isinstance(whole["schema"], dict)
    return whole["schema"]


def convert(
    conversion: Conversion,
    source: Input,
    output: Path,
    options: Options,
    bad_rows: BadRows | None = None,
    read_too: Sequence[Path] = (),
) -> dict:
    """Convert all files of `source` into the data set `output`; returns the summary written to prepare.json.

    bad_rows: those met already (in files read before), to be counted together with those met here. read_too: files
    and folders that are read besides, in which `output` must not lie.

    The summary has: kind, files, rows (per folder), dropped (rows left out by the transform), bad_rows (per
    file). Raises DataError (bad rows, unreadable files, nothing left), SchemaError (columns missing),
    ConfigError (output in the way, fractions, split by time without a time column). On any error `output` is
    untouched.
    """
    _check_split(conversion, source)
    bad_rows, dropped = bad_rows or BadRows(options.bad_rows), 0
    sources = [path for paths in source.files.values() for path in paths]
    with complete_folder(output, [*sources, *read_too], overwrite=options.overwrite) as folder:
        split = _splitter(conversion, source, options)
        writer = PartsWriter(folder, options.writing)
        for name, paths in source.files.items():
            assign = into(name) if name else split
            for file_number, made in _rows(conversion.columns, conversion, paths, bad_rows, options):
                if not name and source.how != "random":
                    made = _with_time(made, conversion.split_column, bad_rows)
                kept = conversion.transform(made)
                dropped += made.table.num_rows - kept.table.num_rows
                keys = (file_number << LINE_BITS) + kept.lines
                _scatter(writer, kept.table, *assign(kept.table, keys))
        writer.close()
        _check_rows(writer.rows, source)
        summary = {
            "kind": conversion.kind,
            "files": {name or "all": [str(path) for path in paths] for name, paths in source.files.items()},
            "rows": {name: writer.rows[name] for name in _in_order(writer.rows)},
            "dropped": dropped,
            "bad_rows": dict(bad_rows.counts),
        }
        write_description(folder, conversion.schema, summary)
    return summary


def _rows(
    columns: Sequence[Column], conversion: Conversion, paths: list[Path], bad_rows: BadRows, options: Options
) -> Iterator[tuple[int, TextTable]]:
    """Yield (number of the file, rows with the columns made); show a progress bar on a terminal."""
    types = text_types(columns)
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc=conversion.kind, disable=None) as bar:
        for number, path in enumerate(paths):
            for text in read_tables(path, conversion.text, types, bad_rows, options.block_bytes, bar.update):
                yield number, make_columns(text, columns, bad_rows)


def _splitter(conversion: Conversion, source: Input, options: Options) -> Splitter:
    if source.how == "random":
        return by_fraction(source.valid, source.test, source.seed)
    if source.how == "day":
        return by_day(conversion.split_column)
    if source.valid_from is not None and source.test_from is not None:
        return by_time(conversion.split_column, source.valid_from, source.test_from)
    hours, bad_rows = HourCounts({}), BadRows(options.bad_rows)
    time = [column for column in conversion.columns if column.name == conversion.time]
    for _, made in _rows(time, conversion, source.files[""], bad_rows, options):
        hours.add(made.table.column(0).drop_null().to_numpy())
    return by_time(conversion.split_column, *hours.cuts(source.valid, source.test))


def _with_time(made: TextTable, time: str, bad_rows: BadRows) -> TextTable:
    """Return the rows that have a time; if the split needs it, the others are bad rows."""
    null = made.table.column(time).is_null().to_numpy()
    if not null.any():
        return made
    for line in made.lines[null].tolist():
        bad_rows.meet(made.path, line, f"column {time!r}: expected a time to split by, found nothing")
    return TextTable(made.path, made.table.filter(pa.array(~null)), made.lines[~null])


def _scatter(writer: PartsWriter, table: pa.Table, folders: list[str], index: np.ndarray) -> None:
    if len(folders) == 1:
        writer.append(folders[0], table)
        return
    order = np.argsort(index, kind="stable")
    bounds = np.searchsorted(index[order], np.arange(len(folders) + 1))
    for folder, first, last in zip(folders, bounds[:-1], bounds[1:], strict=True):
        # take copies: a slice would keep the whole block alive while it waits for its row group to fill
        writer.append(folder, table.take(pa.array(order[first:last])))


def _check_split(conversion: Conversion, source: Input) -> None:
    if "" in source.files and source.how != "random" and conversion.time is None:
        raise ConfigError(f"split: found {source.how!r}, expected random: {conversion.kind} has no time column")


def _in_order(folders: Iterable[str]) -> list[str]:
    return sorted(folders, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))


def _check_rows(rows: dict[str, int], source: Input) -> None:
    expected = [name for name in source.files if name]
    if "" in source.files and source.how != "day":
        valid_from, test_from = source.valid_from, source.test_from
        valid = source.valid > 0 if valid_from is None or test_from is None else valid_from < test_from
        expected += ["train"] + ["valid"] * valid + ["test"] * (source.test > 0)
    for name in expected or [""]:
        if not (rows.get(name) if name else rows):
            raise DataError(f"{name or 'output'}: no rows left after reading {_shown(source)}, expected at least one")


def _shown(source: Input) -> str:
    paths = source.all_files
    return f"{paths[0]}" + (f" and {len(paths) - 1} more files" if len(paths) > 1 else "")
