"""Criteo's display-advertising logs (Kaggle and Terabyte): tab separated, no header, 40 columns.

A line is the label, 13 counts I1..I13 and 26 categories C1..C26 of 8 hexadecimal digits; empty means missing.
The counts are whole numbers and stored as float32, which is what the reader makes of them; the categories are
stored as int64, the number their digits spell (an id read later by `dtype: hex` from the raw log is the same
id). Both decode several times faster than text.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from tessera.ctr.data.convert.columns import Column
from tessera.ctr.data.convert.delimited import TextFormat
from tessera.ctr.data.convert.pipeline import Conversion, Input, Options, convert, schema_from_conf
from tessera.ctr.data.convert.split import day_folder
from tessera.embedding.errors import ConfigError

NUMERIC = [f"I{i}" for i in range(1, 14)]
CATEGORICAL = [f"C{i}" for i in range(1, 27)]


def convert_criteo(source: Input, output: Path, options: Options) -> dict:
    """Convert Criteo logs, plain or compressed; see `pipeline.convert` for the result and the errors."""
    columns = [Column("label", type="int8", values=(0, 1))]
    columns += [Column(name, type="int64", stored="float32") for name in NUMERIC]
    columns += [Column(name, type="hex") for name in CATEGORICAL]
    text = TextFormat("\t", ("label", *NUMERIC, *CATEGORICAL), header="auto", quote=None)
    return convert(Conversion("criteo", text, columns, schema_from_conf("criteo")), source, output, options)


def one_day_per_file(files: list[Path], first_day: str) -> dict[str, list[Path]]:
    """Return the `files` of an Input with a folder day=YYYY-MM-DD for each file, for logs that come as a file per day,
    in order and without a time column (Terabyte: day_0.gz to day_23.gz). Raises ConfigError for an invalid date."""
    try:
        day = datetime.date.fromisoformat(first_day)
    except ValueError:
        raise ConfigError(f"first_day: found {first_day!r}, expected a date as 2026-01-01") from None
    return {day_folder(day + datetime.timedelta(days=n)): [file] for n, file in enumerate(files)}
