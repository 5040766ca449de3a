"""The index over days: its numbers, its page, the links of the days' pages, and what may be wrong with days.jsonl."""

import json
import shutil
from pathlib import Path

import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.report.day_plots import short_names
from tessera.ctr.report.days import write_index
from tessera.ctr.report.report import write_report
from tests.ctr.report.daily_folder import HELD, SKIPPED, day_columns, day_record, make_daily_run
from tests.ctr.report.html_page import check_page
from tests.ctr.report.run_folder import columns, write_predictions

PAGES = (7, 8, 9, 10, 12, 13)  # around the day that is held and the one that is skipped; the others' pages are gone
NAMES = [f"2026-01-{day:02d}" for day in range(3, 17)]


@pytest.fixture(scope="module")
def daily(tmp_path_factory):
    folder = make_daily_run(tmp_path_factory.mktemp("daily") / "clicks & more", rows=400, reports=PAGES)
    return folder, write_index(folder)


def records(folder):
    return [json.loads(line) for line in (folder / "days.jsonl").read_text().splitlines()]


def test_index_json_holds_the_days_and_the_points_of_every_plot(daily):
    folder, index = daily
    values = json.loads((folder / "index.json").read_text())
    assert values == index.values and values["days"] == records(folder)
    assert len(values["plots"]) == (folder / "index.html").read_text().count("<svg")
    auc = values["plots"]["day-auc"]
    assert auc["all rows"]["day"] == NAMES
    for curve, part in (("all rows", None), ("known ids only", "known"), ("with new ids", "new")):
        expected = [day[part] if part else day for day in values["days"] if day["status"] != "skipped"]
        drawn = list(auc[curve]["value"])
        assert drawn.pop(SKIPPED) is None and drawn == pytest.approx([day["auc"] for day in expected], rel=1e-5)
    time = values["plots"]["day-time"]
    assert time["training"]["value"][0] == pytest.approx(values["days"][0]["train_seconds"] / 60, rel=1e-5)


def test_the_summary_counts_the_days_and_names_the_last(daily):
    folder, index = daily
    last = records(folder)[-1]
    summary = index.summary()
    assert summary.startswith("14 days: 12 trained, 1 held, 1 skipped.") and "index.html" in summary
    assert f"AUC {last['auc']:.4f} and logloss {last['logloss']:.4f} on 400 rows of 2026-01-16" in summary


def test_the_page_stands_alone_and_links_every_day_that_has_a_page(daily):
    folder, _ = daily
    html = (folder / "index.html").read_text()
    page = check_page(html)
    expected = [f"days/{NAMES[at]}/report.html" for at in PAGES]
    assert sorted(set(page.links)) == expected and all((folder / link).is_file() for link in page.links)
    days = records(folder)
    for at in (HELD, SKIPPED):
        assert f"{days[at]['partition']} {days[at]['status']}</strong>: {days[at]['reason']}" in html
    assert 'class="held">held<' in html and 'class="skipped">skipped<' in html
    assert "clicks &amp; more" in html and "DeepFM on made_up" in html


def test_cards_compare_the_last_day_with_the_trained_days_before(daily):
    html = (daily[0] / "index.html").read_text()
    days = records(daily[0])
    before = [day["auc"] for day in days[1:-1] if day["status"] == "trained"][-7:]
    mean = sum(before) / 7
    assert f"mean of the 7 days before: {mean:.4f} ({days[-1]['auc'] - mean:+.4f})".replace("-", "−") in html.replace(
        "-", "−"
    )


def test_pages_of_days_lead_to_the_index_and_their_neighbours(daily):
    folder, _ = daily
    for before, at, after in zip([None, *PAGES], PAGES, [*PAGES[1:], None], strict=False):
        day = folder / "days" / NAMES[at]
        page = check_page((day / "report.html").read_text())
        neighbours = [f"../{NAMES[other]}/report.html" for other in (before, after) if other is not None]
        assert page.links == ["../../index.html", *neighbours]
        assert all((day / link).is_file() for link in page.links)
    held = (folder / "days" / NAMES[HELD] / "report.html").read_text()
    assert f"{NAMES[HELD]}: held · logloss 0.6120 is above" in held
    assert "published as full, 48.9 MiB" in (folder / "days" / NAMES[7] / "report.html").read_text()
    assert "all ids known" in held and "with new ids" in held  # slices, from the column new_ids


def test_written_again_nothing_changes_and_a_new_page_gets_its_links_back(daily, tmp_path):
    folder = tmp_path / "clicks & more"
    shutil.copytree(daily[0], folder)

    def contents():
        return {path: path.read_bytes() for path in (folder / "index.json", *folder.rglob("*.html"))}

    before = contents()
    page, unchanged = (folder / "days" / NAMES[at] / "report.html" for at in (8, 12))
    modified = unchanged.stat().st_mtime_ns
    write_report(page.parent)
    assert page.read_bytes() != before[page]
    write_index(folder)
    assert contents() == before
    assert unchanged.stat().st_mtime_ns == modified


def test_the_first_day_alone_and_the_day_after(tmp_path):
    make_daily_run(tmp_path / "run", days=1, rows=100, reports=[0])
    write_index(tmp_path / "run")
    first = tmp_path / "run" / "days" / NAMES[0] / "report.html"
    assert check_page((tmp_path / "run" / "index.html").read_text()).links[0] == f"days/{NAMES[0]}/report.html"
    assert check_page(first.read_text()).links == ["../../index.html"]
    two = make_daily_run(tmp_path / "two", days=2, rows=100, reports=[1])
    (tmp_path / "run" / "days.jsonl").write_bytes((two / "days.jsonl").read_bytes())
    shutil.copytree(two / "days" / NAMES[1], tmp_path / "run" / "days" / NAMES[1])
    write_index(tmp_path / "run")
    assert check_page(first.read_text()).links == ["../../index.html", f"../{NAMES[1]}/report.html"]


def test_a_day_without_a_number(tmp_path):
    """All but partition and status may be absent: nothing was measured, and nothing is drawn."""
    lines = [{"partition": "2026-01-03T05", "status": "skipped", "reason": "<late> & gone"}]
    (tmp_path / "days.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert write_index(tmp_path).values["summary"] == "1 day: 1 skipped."
    html = (tmp_path / "index.html").read_text()
    check_page(html)
    assert "<svg" not in html and "&lt;late&gt; &amp; gone" in html


def test_undefined_metrics_are_gaps(tmp_path):
    folder = make_daily_run(tmp_path / "run", days=3, rows=200, reports=[2])
    days = records(folder)
    days[2]["tables"] = dict.fromkeys(days[2]["tables"])  # static tables have no counts
    days[1] |= {"auc": None, "normalized_entropy": None, "known": None, "new": None, "calibration": None}
    (folder / "days.jsonl").write_text("".join(json.dumps(day) + "\n" for day in days))
    values = write_index(folder).values
    assert values["plots"]["day-auc"]["all rows"]["value"][1] is None
    check_page((folder / "index.html").read_text())


def test_a_partition_that_stands_twice_counts_once_and_an_unfinished_line_not_at_all(tmp_path):
    lines = [{"partition": "a", "status": "held"}, {"partition": "b", "status": "skipped"}]
    lines.append({"partition": "a", "status": "trained"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "days.jsonl").write_text(text + '{"partition": "c", "sta')
    assert [(day["partition"], day["status"]) for day in write_index(tmp_path).values["days"]] == [
        ("a", "trained"),
        ("b", "skipped"),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file"),
        ("", "no day in this file"),
        ("x\n", "line 1 is 'x'"),
        ('{"partition": "a", "status": "trained"}\n[]\n', "line 2"),
        ('{"partition": "a", "status": "done"}\n', '"status" of trained, held, skipped'),
        ('{"status": "held"}\n', "line 1"),
    ],
)
def test_a_wrong_days_file_is_named_and_nothing_is_written(tmp_path, text, message):
    if text is not None:
        (tmp_path / "days.jsonl").write_text(text)
    with pytest.raises(DataError, match="days.jsonl") as caught:
        write_index(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("index*"))


@pytest.mark.parametrize(
    "names, shown",
    [
        (["2026-01-03", "2026-12-31"], ["01-03", "12-31"]),
        (["2025-12-31", "2026-01-01"], ["2025-12-31", "2026-01-01"]),
        (["2026-01-03T05", "2026-01-03T06"], ["01-03 05h", "01-03 06h"]),
        (["week-1", "2026-01-03"], ["week-1", "2026-01-03"]),
    ],
)
def test_names_of_days_on_axes(names, shown):
    assert short_names([{"partition": name} for name in names]) == shown


def test_the_page_of_a_run_that_is_no_day_has_no_links(tmp_path):
    write_predictions(tmp_path / "predictions", "a.parquet", columns(3, 100))
    write_report(tmp_path)
    assert check_page((tmp_path / "report.html").read_text()).links == []


def test_the_document_names_every_key_of_a_day():
    text = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text()
    assert all(f"`{key}`" in text for key in day_record(0, "2026-01-03", day_columns(0, 100), 1000))
