"""Avazu's click log (Kaggle): comma separated, one column of time as YYMMDDHH, 8-digit hexadecimal and
integer ids.

The impression's own id is left out: it is unique to the row. `hour` becomes three columns: `time` (seconds
since 1970, taken as UTC), `hour` (0 to 23) and `weekday` (Monday is 0). All ids are stored as int64. The
header is recognised where it is present.
"""

from __future__ import annotations

from pathlib import Path

from tessera.ctr.data.convert.columns import Column
from tessera.ctr.data.convert.delimited import TextFormat
from tessera.ctr.data.convert.pipeline import Conversion, Input, Options, convert, schema_from_conf

HEX = [
    "site_id",
    "site_domain",
    "site_category",
    "app_id",
    "app_domain",
    "app_category",
    "device_id",
    "device_ip",
    "device_model",
]
BEFORE_HEX = ["C1", "banner_pos"]
TIME = "%y%m%d%H"
AFTER_HEX = ["device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22))]


def convert_avazu(source: Input, output: Path, options: Options) -> dict:
    """Convert Avazu logs, plain or compressed; see `pipeline.convert` for the result and the errors."""
    text = TextFormat(",", ("id", "click", "hour", *BEFORE_HEX, *HEX, *AFTER_HEX), header="auto")
    columns = [
        Column("label", "click", type="int8", values=(0, 1)),
        Column("time", "hour", type="time", format=TIME),
        Column("hour", type="hour", format=TIME),
        Column("weekday", "hour", type="weekday", format=TIME),
        *(Column(name) for name in BEFORE_HEX),
        *(Column(name, type="hex") for name in HEX),
        *(Column(name) for name in AFTER_HEX),
    ]
    conversion = Conversion("avazu", text, columns, schema_from_conf("avazu"), time="time")
    return convert(conversion, source, output, options)
