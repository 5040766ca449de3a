"""Write the statistics of a data set: a page for people, and the JSON file that schemas read (`ctr/data/fitted.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessera.ctr.data.column_statistics import KEPT, VERSION, statistics_of
from tessera.ctr.data.convert.output import complete_folder
from tessera.ctr.data.errors import SchemaError, nearest
from tessera.ctr.data.files import DataFile
from tessera.ctr.data.listing import list_files
from tessera.ctr.data.vocabularies import ValueCounts, holds_ids, write_of_columns
from tessera.ctr.report.files import json_text
from tessera.ctr.report.page import render
from tessera.ctr.report.plot import SERIES, Plot, Table, canvas, inline_svg

STATISTICS, PAGE, VOCABULARY = "statistics.json", "statistics.html", "vocabulary"
SHOWN = 24  # columns of a figure
DRIFTED = 0.2  # the usual threshold of the population stability index


def write_statistics(
    data: Sequence[str],
    against: Sequence[str] | None,
    target: Path,
    *,
    overwrite: bool = False,
    vocabulary: Sequence[str] | None = None,
    min_count: int = 2,
) -> dict[str, Any]:
    """Read a data set, and one that it is compared with, and write both files to a folder; return what JSON says.

    vocabulary: columns of which the folder also gets one, `ctr/data/vocabularies.py`, of the values that occur at least
    `min_count` times; none named: of all that hold ids.

    Raises DataError: files that cannot be read; SchemaError: a column that is not there or holds no ids; ConfigError:
    the folder is in the way.
    """
    files = list_files(list(data)).files
    counted = {name: ValueCounts() for name in columns_of_ids(files, vocabulary)} if vocabulary is not None else {}
    found = statistics_of(files, counted)
    columns = {name: one.described() for name, one in found.items()}
    rows = next((one.rows for one in found.values()), 0)
    told: dict[str, Any] = {"version": VERSION, "data": list(map(str, data)), "files": len(files), "rows": rows}
    if against:
        reference = statistics_of(list_files(list(against)).files)
        told["against"] = list(map(str, against))
        for name in [name for name in columns if name in reference]:
            columns[name]["drift"] = found[name].drift(reference[name])
    told["columns"] = columns
    sources = [Path(one) for one in [*data, *(against or [])] if "://" not in str(one)]
    with complete_folder(target, sources, overwrite=overwrite) as folder:
        (folder / STATISTICS).write_text(json_text(told) + "\n")
        (folder / PAGE).write_text(page(told), encoding="utf-8")
        if vocabulary is not None:
            told["vocabulary"] = write_of_columns(folder / VOCABULARY, counted, min_count)
    return told


def columns_of_ids(files: Sequence[DataFile], wanted: Sequence[str]) -> list[str]:
    """Return the columns of which a vocabulary can be made: those wanted, or all. Raises SchemaError: others."""
    with files[0].open() as parquet:
        schema = parquet.schema_arrow
    able = [field.name for field in schema if holds_ids(field.type)]
    for name in wanted:
        if name not in able:
            why = f"holds {schema.field(name).type}, no ids" if name in schema.names else "is not there"
            raise SchemaError(f"--vocabulary: column {name!r} {why}; {nearest(name, able)}")
    return list(wanted) or able


def page(told: dict[str, Any]) -> str:
    """Return the page of what the JSON file says."""
    columns = told["columns"]
    remarks = []
    if "against" in told:
        remarks.append(f"Compared with {', '.join(told['against'])}.")
    plots = [_null_rates(columns), _distinct(columns), _drift(columns)]
    return render(
        "data.html",
        heading="Columns",
        title=", ".join(told["data"]),
        subtitle="statistics of a data set",
        lead=f"{told['rows']:,} rows and {len(columns)} columns in {_files(told['files'])}.",
        remarks=remarks,
        numbers=STATISTICS,
        plots=[plot for plot in plots if plot is not None],
        tables=[
            ("Numbers", "numbers", f"Quantiles are of at most {KEPT:,} values of a column.", _numbers(columns)),
            ("Ids", "ids", f"Counts of ids follow from at most {KEPT:,} ids of a column.", _ids(columns)),
            (
                "Drift",
                "drift",
                "PSI: population stability index, 0 where both sets are alike; above 0.2 most people look closer. New "
                "ids: share of ids that the other set does not have, and of their occurrences.",
                _drifts(columns),
            ),
            ("Other columns", "others", "Neither numbers nor ids.", _others(columns)),
        ],
    )


def _numbers(columns: Mapping[str, Any]) -> Table:
    heads = ["column", "null", "mean", "std", "min", "1 %", "median", "99 %", "max"]
    rows = []
    for name, one in columns.items():
        if "quantiles" in one:
            at = one["quantiles"]
            step = (len(at) - 1) // 100
            shown = [one["mean"], one["std"], one["min"], at[step], at[50 * step], at[-1 - step], one["max"]]
            rows.append([name, _percent(one["null_rate"]), *(f"{value:.5g}" for value in shown)])
    return Table(heads, rows)


def _ids(columns: Mapping[str, Any]) -> Table:
    heads = ["column", "null", "per row", "distinct", "at least 2 times", "10 times", "100 times"]
    rows = []
    for name, one in columns.items():
        if "distinct" in one:
            least = [f"{one['ids_at_least'][count]:,}" for count in ("2", "10", "100")]
            per_row = f"{one.get('items_per_row', 1 - one['null_rate']):.3g}"
            rows.append([name, _percent(one["null_rate"]), per_row, f"{one['distinct']:,}", *least])
    return Table(heads, rows)


def _drifts(columns: Mapping[str, Any]) -> Table:
    heads = ["column", "PSI", "null", "null there", "new ids", "their rows"]
    found = [(name, one, one["drift"]) for name, one in columns.items() if "drift" in one]
    found.sort(key=lambda each: -max(each[2].get("psi", 0), each[2].get("new_id_rows", 0)))
    rows = []
    for name, one, drift in found:
        new = [_percent(drift[key]) if key in drift else "" for key in ("new_ids", "new_id_rows")]
        psi = f"{drift['psi']:.3f}" if "psi" in drift else ""
        rows.append([name, psi, _percent(one["null_rate"]), _percent(drift["null_rate"]), *new])
    return Table(heads, rows)


def _others(columns: Mapping[str, Any]) -> Table:
    others = {name: one for name, one in columns.items() if "quantiles" not in one and "distinct" not in one}
    return Table(
        ["column", "type", "null"], [[n, one["type"], _percent(one["null_rate"])] for n, one in others.items()]
    )


def _null_rates(columns: Mapping[str, Any]) -> Plot | None:
    rates = {name: 100 * one["null_rate"] for name, one in columns.items() if one["null_rate"]}
    return _bars("nulls", "Missing values", "% of rows, columns with the most first", rates, lambda v: f"{v:.3g} %")


def _distinct(columns: Mapping[str, Any]) -> Plot | None:
    counts = {name: float(one["distinct"]) for name, one in columns.items() if one.get("distinct")}
    caption = "distinct ids (logarithmic), columns with the most first"
    return _bars("distinct", "Distinct ids", caption, counts, lambda v: f"{v:,.0f}", log=True)


def _drift(columns: Mapping[str, Any]) -> Plot | None:
    found = {name: one["drift"]["psi"] for name, one in columns.items() if "psi" in one.get("drift", {})}
    caption = f"population stability index; {DRIFTED:g} is dashed"
    return _bars("drift", "Drift of numbers", caption, found, lambda v: f"{v:.3f}", mark=DRIFTED)


def _bars(
    name: str,
    title: str,
    caption: str,
    values: Mapping[str, float],
    text: Callable[[float], str],
    *,
    log: bool = False,
    mark: float | None = None,
) -> Plot | None:
    """Draw a bar for each of the largest values; None without any."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    if not ordered:
        return None
    shown = ordered[:SHOWN]
    places = np.arange(len(shown))[::-1]
    with canvas(height_inches=0.8 + 0.17 * len(shown)) as (figure, (axes,)):
        axes.barh(places, [value for _, value in shown], color=SERIES[0], height=0.7, log=log)
        axes.set_yticks(places, [one if len(one) <= 22 else f"{one[:21]}…" for one, _ in shown])
        axes.grid(visible=False, axis="y")
        if log:  # by default as powers of ten in TeX, which a page shows as it is written
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.xaxis.set_minor_formatter("")
            axes.set_xlim(left=0.8)
        if mark is not None:
            axes.axvline(mark, color=SERIES[1], linestyle="--")
        said = f"{title}: {shown[0][0]} has the most, {text(shown[0][1])}"
        svg = inline_svg(figure, name, said)
    table = Table(["column", title.lower()], [[column, text(value)] for column, value in ordered])
    points: dict[str, np.ndarray | list] = {
        "column": [one for one, _ in ordered],
        "value": [value for _, value in ordered],
    }
    return Plot(name, title, caption, svg, table, {title: points})


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
