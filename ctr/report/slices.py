"""Measure parts of a split: rows by the value of a feature, or by whether their ids were known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics.exact import group_auc, summarise
from tessera.ctr.metrics.score_table import Rows, run_starts, score_table
from tessera.ctr.report.definitions import number, percent
from tessera.ctr.report.plot import Table
from tessera.ctr.report.predictions import NEW_IDS, SLICE, read_column, slice_field

# In the run folder: feature -> hash of a string, as hexadecimal digits -> the string.
SLICE_NAMES = "slice_names.json"
TOP = 20
IDS_CAPTION = "Rows with at least one id that the tables did not know when they were scored, against all others."
NUMERIC_BUCKETS = 10
METRICS = (
    ("auc", "AUC"),
    ("logloss", "logloss"),
    ("normalized_entropy", "normalized entropy"),
    ("calibration", "calibration"),
    ("gauc", "GAUC"),
)


@dataclass(frozen=True)
class Slices:
    """The slices of one split by one feature.

    rows: of the split. distinct: values that occur. parts: name and metrics of each of the TOP values with the most
    rows, most rows first (buckets of a number in its order), and at the end all other values together.
    """

    feature: str
    rows: int
    distinct: int
    caption: str
    parts: list[tuple[str, dict[str, Any]]]

    def json(self) -> dict[str, Any]:
        """Return the content for report.json: the number of values, and a list of slices with their metrics."""
        return {"distinct": self.distinct, "slices": [{"value": name, **metrics} for name, metrics in self.parts]}

    def table(self) -> Table:
        grouped = any(one["gauc"] is not None for _, one in self.parts)
        head = ["rows", "share of rows", "observed rate", *(title for _, title in METRICS[: 4 + grouped])]
        rows = []
        for name, one in self.parts:
            rate = percent(one["observed_rate"])
            cells = [f"{one['rows']:,}", f"{one['rows'] / max(1, self.rows):.1%}", rate]
            rows.append([name, *cells, *(number(one[key]) for key, _ in METRICS[: 4 + grouped])])
        return Table(["slice", *head], rows)


def measure_slices(
    folder: Path, split: str, column: str, names: dict[str, str] | None = None, top: int = TOP
) -> Slices:
    """Return metrics by the values of `column` in the parquet files of `folder`.

    A row of a multi-valued feature counts in the slice of each of its values; a row without any is in `missing`.
    Memory: the rows of the split and this one column.

    Args:
        names: what to show for an id that is the hash of a string, by its hexadecimal digits.

    Raises:
        DataError: the files cannot be used, or the column is of a type that has no slices.
    """
    rows, values = read_column(folder, split, column)
    coded = _coded(folder, slice_field(folder, column), values, names or {})
    del values
    counts = np.bincount(coded.codes, minlength=len(coded.names))
    # Stable, so that values of equal counts stand in their own order.
    chosen = np.argsort(-counts, kind="stable")[:top]
    chosen = np.sort(chosen) if coded.ordered else chosen
    slice_of_code = np.full(len(counts), len(chosen))
    slice_of_code[chosen] = np.arange(len(chosen))
    slice_of = slice_of_code[coded.codes]
    order = np.argsort(slice_of, kind="stable")
    slice_of = slice_of[order]
    order = order if coded.rows is None else coded.rows[order]
    starts = run_starts(slice_of)
    titles = [coded.names[code] for code in chosen] + [f"{len(counts) - len(chosen):,} other values"]
    parts = [
        (titles[slice_of[start]], _metrics(rows, order[start:stop]))
        for start, stop in zip(starts, np.append(starts[1:], len(order)), strict=True)
    ]
    distinct = int(np.count_nonzero(counts))
    feature = "new ids" if column == NEW_IDS else column.removeprefix(SLICE)
    caption = coded.caption or f"{distinct:,} value{'' if distinct == 1 else 's'} in {len(rows.prediction):,} rows."
    return Slices(feature, len(rows.prediction), distinct, caption, parts)


def largest_ids(folder: Path, split: str, column: str, top: int = TOP) -> np.ndarray:
    """Return the ids (int64) with the most rows, of a column of ids or of lists of them."""
    _, values = read_column(folder, split, column)
    values = values.combine_chunks()
    ids = values.flatten() if pa.types.is_list(values.type) else values
    distinct, counts = np.unique(ids.drop_null().to_numpy(), return_counts=True)
    # More than are shown: an id that stands twice in a row counts once there.
    return distinct[np.argsort(-counts, kind="stable")[: 2 * top]]


def _metrics(rows: Rows, chosen: np.ndarray) -> dict[str, Any]:
    part = Rows(
        rows.prediction[chosen],
        rows.positive[chosen],
        None if rows.weight is None else rows.weight[chosen],
        None if rows.group is None else rows.group[chosen],
    )
    return summarise(score_table(part), None if part.group is None else group_auc(part))


@dataclass(frozen=True)
class _Coded:
    """A column as small numbers: `codes` int64, index into `names`; `rows` the row of each, None: one each, in
    order."""

    codes: np.ndarray
    names: list[str]
    rows: np.ndarray | None = None
    ordered: bool = False
    caption: str = ""


def _coded(folder: Path, field: pa.Field, values: pa.ChunkedArray, names: dict[str, str]) -> _Coded:
    kind = field.type
    if pa.types.is_boolean(kind):
        return _Coded(
            values.to_numpy().astype(np.int64), ["all ids known", "with new ids"], ordered=True, caption=IDS_CAPTION
        )
    if pa.types.is_floating(kind):
        transform = (field.metadata or {}).get(b"transform", b"none").decode()
        return _buckets(values.to_numpy(), "" if transform == "none" else f" after the transform {transform}")
    if pa.types.is_list(kind):
        bags = values.combine_chunks()
        lengths = bags.value_lengths().fill_null(0).to_numpy()
        row, found = np.repeat(np.arange(len(lengths)), lengths), bags.flatten().to_numpy()
        without = np.flatnonzero(lengths == 0)
    elif pa.types.is_integer(kind):
        there = values.is_valid().to_numpy()
        row, found, without = np.flatnonzero(there), values.drop_null().to_numpy(), np.flatnonzero(~there)
    else:
        raise DataError(f"{folder}: column {field.name} is {kind}; expected integers, lists of them, numbers or bool")
    distinct, codes = np.unique(found, return_inverse=True)
    if pa.types.is_list(kind):  # an id that stands twice in a bag is one value of the row
        pairs = np.unique(row * len(distinct) + codes)
        row, codes = pairs // max(1, len(distinct)), pairs % max(1, len(distinct))
    shown = _names(field, distinct, names)
    if len(without):
        row, codes = np.append(row, without), np.append(codes, np.full(len(without), len(distinct)))
        shown.append("missing")
    return _Coded(codes, shown, row, b"boundaries" in (field.metadata or {}))


def _names(field: pa.Field, ids: np.ndarray, names: dict[str, str]) -> list[str]:
    """Return the stored form of ids, as far as it is known: the reader keeps only a 64-bit hash of a string."""
    metadata = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    if "boundaries" in metadata:
        shown = _intervals([f"{edge:g}" for edge in json.loads(metadata["boundaries"])])
        return [shown[i] for i in ids.tolist()]
    if metadata.get("dtype", "int") == "int":
        return [str(i) for i in ids.tolist()]
    if metadata["dtype"] == "uint64":
        return [str(i) for i in ids.view(np.uint64).tolist()]
    digits = [f"{i:x}" for i in ids.view(np.uint64).tolist()]
    return digits if metadata["dtype"] == "hex" else [names.get(one, f"hash {one}") for one in digits]


def _buckets(values: np.ndarray, of: str) -> _Coded:
    """Return buckets with about equal rows, between quantiles of the values that occur."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, NUMERIC_BUCKETS + 1), method="inverted_cdf"))
    if len(edges) == 1:
        return _Coded(np.zeros(len(values), np.int64), [f"{edges[0]:g}"], ordered=True)
    edges = edges[1:-1] if len(edges) > 2 else edges[1:]
    caption = f"{len(edges) + 1} buckets of about equal rows, by the value{of}."
    names = _intervals([f"{edge:.4g}" for edge in edges])
    return _Coded(np.searchsorted(edges, values, side="right"), names, ordered=True, caption=caption)


def _intervals(edges: list[str]) -> list[str]:
    """Return names of the buckets between edges; each edge belongs to the bucket above it."""
    between = [f"{low} to {high}" for low, high in pairwise(edges)]
    return [f"below {edges[0]}", *between, f"{edges[-1]} and above"]
