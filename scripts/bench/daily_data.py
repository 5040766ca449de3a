"""The days that `daily_methods.py` compares methods on: synthetic ones, and MovieLens by week or piece by piece."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tessera.ctr.data.convert.command import add_kinds, prepare
from tessera.ctr.data.listing import list_files

BATCH_SHARE = 5 / 7  # of a stream: what is trained on before it begins (Monolith: five days of seven)
PIECES = 100


class Days:
    """The partitions of a data set, in order, and which of their rows have an id that was never seen before."""

    def __init__(self, folder: Path, column: str) -> None:
        self.folder, self.names = folder, sorted(p.name.removeprefix("day=") for p in folder.glob("day=*"))
        self.new: dict[str, np.ndarray] = {}
        seen = np.zeros(0, np.int64)
        for name in self.names:
            files = list_files(str(folder / f"day={name}")).files
            ids = np.concatenate([pq.read_table(f.path, columns=[column])[column].to_numpy() for f in files])
            self.new[name] = ~np.isin(ids, seen)
            seen = np.union1d(seen, ids)


def partition(rows: pa.Table, key: np.ndarray, output: Path) -> None:
    for name in np.unique(key):
        (output / f"day={name}").mkdir(parents=True)
        part = rows.filter(pa.array(key == name))
        pq.write_table(part, output / f"day={name}" / "part.parquet", row_group_size=max(64, part.num_rows // 16))


def make_days(options: argparse.Namespace, folder: Path, column: str) -> Days:
    """Return partitions of the data set: days, weeks, or (--online) the first 5/7 of its rows and 100 pieces of the
    rest."""
    parser = argparse.ArgumentParser()
    add_kinds(parser)
    made = folder / "made"
    if options.data == "synthetic":
        command = ["--rows", str(options.rows), "--days", str(options.days), "--seed", str(options.data_seed)]
    else:
        command = ["--input", options.input, "--split", "time", "--valid-fraction", "0", "--test-fraction", "0"]
    prepare(parser.parse_args([options.data, "--output", str(made), *command]))
    if options.data == "synthetic" and not options.online:
        return Days(made, column)
    rows = pa.concat_tables(pq.read_table(file.path) for file in list_files(str(made)).files)
    times = rows["time" if options.data == "synthetic" else "timestamp"].to_numpy()
    order = np.argsort(times, kind="stable")
    rows, times = rows.take(pa.array(order)), times[order]
    if options.online:
        place = np.arange(rows.num_rows) / rows.num_rows
        piece = 1 + np.floor((place - BATCH_SHARE) / (1 - BATCH_SHARE) * PIECES).clip(0, PIECES - 1)
        key = np.datetime64("2000-01-01") + np.where(place < BATCH_SHARE, 0, piece).astype(int)
        partition(rows, key.astype(str), folder / "days")
    else:
        weeks = times.astype("datetime64[s]").astype("datetime64[W]").astype("datetime64[D]")
        partition(rows, weeks.astype(str), folder / "days")
    return Days(folder / "days", column)
