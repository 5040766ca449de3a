"""Dynamic tables in the report: from the log's lines to the section, the plots and report.json."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.report.curves import POINTS
from tessera.ctr.report.history import TABLE_COUNTS, read_history
from tessera.ctr.report.report import write_report
from tessera.ctr.report.tables import numbers_by_table, table_plots
from tessera.distributed.plan import size
from tests.ctr.report.run_folder import columns, counts, make_run, table_line, table_lines, write_predictions


def history_of(folder, *lines):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_history(path)


def report_of(folder, *lines):
    history_of(folder, *lines)
    write_predictions(folder / "predictions", "a.parquet", columns(3, 100))
    return write_report(folder), (folder / "report.html").read_text()


def cells(html):
    """The section's table as (rows of text, row of totals)."""
    section = re.search('<section aria-labelledby="tables">.*?</section>', html, re.DOTALL)[0]
    table = section[section.index('<div class="panel">') :]
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", table)]
    assert "<tfoot>" in table and "At step 2,000, over all ranks." in table
    return rows[:-1], rows[-1]


def test_the_page_and_report_json_hold_the_last_line(tmp_path):
    report = write_report(make_run(tmp_path / "run", rows=1000))
    last = table_lines()[-1]
    values = json.loads((tmp_path / "run" / "report.json").read_text())["tables"]
    assert values == {**last["tables"], "total": {key: last[key] for key in TABLE_COUNTS}} == report.values["tables"]
    (head, *rows), total = cells((tmp_path / "run" / "report.html").read_text())
    assert head == ["table", "rows", "bytes", "bytes per row", "admitted", "rejected", "expired", "evicted"]
    # Largest first, names escaped.
    assert [row[0] for row in rows] == ["user &amp; &lt;id&gt;", "item_id", "hour"] and total[0] == "total"
    user = last["tables"]["user & <id>"]
    for row, expected in ((rows[0], user), (total, last)):
        texts = [f"{expected[key]:,}" for key in ("rows", "admitted", "rejected", "expired", "evicted")]
        assert [row[1], *row[4:]] == texts
        assert row[2:4] == [size(expected["bytes"]), f"{expected['bytes'] / expected['rows']:,.1f}"]
    assert sum(int(row[1].replace(",", "")) for row in rows) == int(total[1].replace(",", ""))


def test_series_over_steps_and_what_the_plots_say(tmp_path):
    lines = table_lines()
    history = history_of(tmp_path, *lines)
    for key in ("step", *TABLE_COUNTS):
        np.testing.assert_array_equal(history.tables[key], [line[key] for line in lines])
    held, moved = table_plots(history)
    assert f"to {lines[-1]['rows']:,} rows and {size(lines[-1]['bytes'])}." in held.svg
    for name in ("admitted", "rejected", "expired", "evicted"):
        assert f"{lines[-1][name]:,} {name}" in moved.svg
    for plot in (held, moved):
        assert plot.table.rows[0][0] == "10" and plot.table.rows[-1][0] == "2,000"


def test_without_such_lines_there_is_no_section(tmp_path):
    report, html = report_of(tmp_path, {"kind": "train", "step": 1, "loss": 0.5})
    assert "tables" not in report.values and 'id="tables"' not in html and "table-size" not in html


def test_a_run_that_went_back_to_a_checkpoint(tmp_path):
    rows = [(10, 100), (20, 200), (30, 300), (20, 250), (25, 260)]
    history = history_of(tmp_path, *(table_line(step, {"a": counts(n, 8 * n, n)}) for step, n in rows))
    # What was logged of step 30 is of a state that no longer is.
    assert history.tables["step"].tolist() == [10, 20, 25] and history.tables["rows"].tolist() == [100, 250, 260]
    assert history.last_tables.step == 25 and history.last_tables.by_table["a"]["rows"] == 260


def test_curves_are_thinned_to_points_that_were_logged(tmp_path):
    # Up and down, so that the drawing itself leaves no point out.
    rows = np.random.default_rng(0).integers(1, 1000, 5000).tolist()
    history = history_of(tmp_path, *(table_line(step, {"a": counts(n, 8, n)}) for step, n in enumerate(rows)))
    held, moved = table_plots(history)
    longest = max(path.count("L") for plot in (held, moved) for path in re.findall(r'<path d="([^"]*)"', plot.svg))
    assert 0.9 * POINTS < longest <= POINTS and f"to {rows[-1]:,} rows" in held.svg


@pytest.mark.parametrize("rows, size_in_bytes", [(0, 0), (1, 1023), (10**10, 10**13)])
def test_one_line_and_no_rows_and_very_many(tmp_path, rows, size_in_bytes):
    history = history_of(tmp_path, table_line(0, {"a": counts(rows, size_in_bytes, rows), "b": counts(0, 0, 0)}))
    assert all("<svg" in plot.svg and "nan" not in plot.svg for plot in table_plots(history))
    table = numbers_by_table(history.last_tables)
    assert [row[0] for row in table.rows] == ["a", "b"]
    assert table.rows[1] == ["b", "0", "0 B", "–", "0", "0", "0", "0"]


def test_tables_of_equal_bytes_are_in_order_of_their_names(tmp_path):
    tables = {name: counts(1, 8, 1) for name in ("c", "a", "total", "b")}
    report, html = report_of(tmp_path, table_line(2000, tables))
    rows, total = cells(html)
    assert [row[0] for row in rows[1:]] == ["a", "b", "c", "total"] and total[:3] == ["total", "4", "32 B"]
    # A table called total does not take the place of the sum, nor the sum its place.
    assert report.values["tables"]["total"]["rows"] == 4 and report.values["tables"]["table total"]["rows"] == 1


@pytest.mark.parametrize(
    "change", [{"rows": None}, {"tables": None}, {"tables": []}, {"tables": {"a": {"rows": 1}}}, {"bytes": 1.5}]
)
def test_a_last_line_without_its_counts_is_named(tmp_path, change):
    line = table_line(20, {"a": counts(1, 8, 1)})
    with pytest.raises(DataError, match="line 2 .* expected whole numbers rows, bytes") as caught:
        history_of(tmp_path, {**line, "step": 10}, {**line, **change})
    assert str(tmp_path / "metrics.jsonl") in str(caught.value) and "\n" not in str(caught.value)
    # An earlier one is a gap.
    history = history_of(tmp_path, {**line, **change, "step": 10}, line)
    assert history.tables["rows"][-1] == 1 and len(table_plots(history)) == 2


def test_the_document_of_metrics_names_every_count():
    text = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text()
    assert all(f"| `{key}` |" in text for key in TABLE_COUNTS)
