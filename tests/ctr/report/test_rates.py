"""Rates of weighted rows are weighted wherever they are shown, and undefined where there is nothing to share."""

import json

import numpy as np
import pytest

from tessera.ctr.daily.day_record import DayRecord, Stage
from tessera.ctr.daily.records import measure
from tessera.ctr.metrics.exact import evaluate_predictions
from tessera.ctr.metrics.score_table import check_rows, score_table
from tessera.ctr.report.comparison import compare_runs
from tessera.ctr.report.curves import wilson_interval
from tessera.ctr.report.days import write_index
from tessera.ctr.report.report import write_report
from tessera.ctr.report.slices import measure_slices
from tests.ctr.report.html_page import check_page
from tests.ctr.report.run_folder import columns, write_predictions

ROWS = 2000


def weighted(seed=1, heavy=0.0):
    """Rows of which those with label `heavy` weigh 3: the rate by weight is far from that by rows."""
    values = columns(seed, ROWS, rate=-0.3)
    values["weight"] = np.where(values["label"] == heavy, 3, 1).astype(np.float32)
    values["row"], values["new_ids"] = np.arange(ROWS), np.arange(ROWS) % 5 == 0
    values["slice.c"] = np.arange(ROWS) % 3
    return values


def rate(values, chosen=slice(None)):
    label, weight = values["label"][chosen], values["weight"][chosen].astype(np.float64)
    return float((label * weight).sum() / weight.sum())


@pytest.mark.parametrize("heavy", [0.0, 1.0])
def test_the_page_of_a_run_and_its_slices(tmp_path, heavy):
    values = weighted(heavy=heavy)
    write_predictions(tmp_path / "predictions", "test-00000.parquet", values)
    report = write_report(tmp_path).values
    assert report["observed_rate"] == pytest.approx(rate(values), rel=1e-12)
    assert abs(rate(values) - values["label"].mean()) > 0.1
    page = (tmp_path / "report.html").read_text()
    for column in ("slice.c", "new_ids"):
        slices = measure_slices(tmp_path / "predictions", "test", column)
        for at, row in enumerate(slices.table().rows):
            chosen = values[column] == at
            assert row[3] == f"{rate(values, chosen):.2%}" and f"<td>{row[3]}</td>" in page
    assert f"{values['label'].mean():.2%}" not in page


def test_the_index_of_days(tmp_path):
    lines = []
    for day in range(3):
        name, values = f"2026-01-0{day + 1}", weighted(day)
        folder = tmp_path / "days" / name / "predictions"
        write_predictions(folder, "test-00000.parquet", values)
        lines.append(DayRecord(name, "0", Stage.TRAINED).to_json() | measure(folder))
        assert lines[-1]["observed_rate"] == pytest.approx(rate(values), rel=1e-12)
        assert lines[-1]["new"]["observed_rate"] == pytest.approx(rate(values, values["new_ids"]), rel=1e-12)
    (tmp_path / "days.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = write_index(tmp_path).values["plots"]["day-rows"]["observed rate"]["value"]
    page = (tmp_path / "index.html").read_text()
    for day in range(3):
        assert drawn[day] == pytest.approx(rate(weighted(day)), rel=1e-5)
        assert f"<td>{rate(weighted(day)):.2%}</td>" in page


def test_days_of_one_class_are_undefined_and_days_not_scored_a_dash(tmp_path):
    values = weighted()
    values["label"][:] = 0
    write_predictions(tmp_path / "one", "test-00000.parquet", values)
    for array in values:
        values[array] = values[array][:0]
    write_predictions(tmp_path / "none", "test-00000.parquet", values)
    days = [
        DayRecord("2026-01-01", "0", Stage.TRAINED).to_json() | measure(tmp_path / "one"),
        DayRecord("2026-01-02", "0", Stage.TRAINED).to_json() | measure(tmp_path / "none"),
        DayRecord("2026-01-03", "0", Stage.SKIPPED).to_json(),
    ]
    (tmp_path / "days.jsonl").write_text("".join(json.dumps(line) + "\n" for line in days))
    write_index(tmp_path)
    page = (tmp_path / "index.html").read_text()
    check_page(page)
    cells = {}
    for row in page.partition("<h3>Quality</h3>")[2].split("<tr>")[1:]:
        name = row.partition("2026-01-0")[2][:1]
        cells.setdefault(name, [cell.partition("</td>")[0] for cell in row.split("<td>")[1:]])
    # status, rows, observed rate, AUC, logloss, normalized entropy, calibration, GAUC
    assert cells["1"][1:4] == ["2,000", "0.00%", "undefined"] and cells["1"][5:8] == ["undefined"] * 3
    assert cells["2"][1:8] == ["0", *["undefined"] * 6]
    assert cells["3"][1:8] == ["–"] * 7


def test_a_comparison(tmp_path):
    values = weighted()
    for name, noise in (("a", 0.0), ("b", 0.01)):
        changed = values | {"prediction": np.clip(values["prediction"] + np.float32(noise), 0, 1)}
        write_predictions(tmp_path / name / "predictions", "test-00000.parquet", changed)
    found = compare_runs(tmp_path / "a", tmp_path / "b", tmp_path / "out", replicates=0).values
    assert found["first"]["observed_rate"] == found["second"]["observed_rate"] == pytest.approx(rate(values))
    assert f"<td>{rate(values):.4f}</td>" in (tmp_path / "out" / "comparison.html").read_text()


def test_slices_without_a_class_or_weight(tmp_path):
    values = weighted()
    values["label"][values["slice.c"] == 1] = 1
    values["weight"][values["slice.c"] == 2] = 0
    write_predictions(tmp_path / "predictions", "test-00000.parquet", values)
    table = {row[0]: row[1:] for row in measure_slices(tmp_path / "predictions", "test", "slice.c").table().rows}
    assert table["1"][2:4] == ["100.00%", "undefined"] and "2" not in table
    everything = evaluate_predictions(values["prediction"], values["label"], np.zeros(ROWS, np.float32))
    assert everything["observed_rate"] is None and everything["undefined"]["observed_rate"]


@pytest.mark.parametrize("weights", [[1.0], [0.25], [1.0, 3.0], [1.0, 1000.0]])
def test_intervals_of_the_calibration_curve_know_the_weights(weights):
    generator = np.random.default_rng(3)
    prediction, label = generator.random(6000), (generator.random(6000) < 0.3).astype(np.float32)
    weight = generator.choice(weights, 6000)
    bins = score_table(check_rows(prediction, label, weight)).calibration_bins(4)
    share = np.mean(weights) ** 2 / np.mean(np.square(weights))  # of the rows that count as much as equal ones
    np.testing.assert_allclose(bins.effective_rows / bins.rows, share, rtol=0.05)
    if len(weights) == 1:
        np.testing.assert_allclose(bins.effective_rows, bins.rows, rtol=1e-12)
    low, high = wilson_interval(bins)
    np.testing.assert_allclose(
        (high - low) / np.sqrt(bins.observed * (1 - bins.observed)), 2 * 1.96 / np.sqrt(bins.rows * share), rtol=0.05
    )


def test_columns_of_the_index_that_older_runs_lack_are_dashes(tmp_path):
    line = {"partition": "2026-01-01", "status": "trained", "rows": 5, "positives": 2, "auc": 0.5, "logloss": 0.7}
    (tmp_path / "days.jsonl").write_text(json.dumps(line) + "\n")
    write_index(tmp_path)
    assert "40.00%" not in (tmp_path / "index.html").read_text()
