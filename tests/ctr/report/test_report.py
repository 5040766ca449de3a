"""The written report: its numbers, its page, and what happens when something is missing or wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics.exact import evaluate_predictions
from tessera.ctr.report.definitions import DEFINITIONS
from tessera.ctr.report.report import write_report
from tests.ctr.report.html_page import Page, check_page
from tests.ctr.report.run_folder import columns, make_run, metrics_lines, write_predictions
from tests.ranks import ROOT, run_script

METRICS = (
    "auc",
    "logloss",
    "gauc",
    "normalized_entropy",
    "calibration",
    "pr_auc",
    "expected_calibration_error",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "made-up-run", rows=4000)
    return folder, write_report(folder)


def test_report_json_holds_the_exact_metrics(run):
    folder, report = run
    values = json.loads((folder / "report.json").read_text())
    assert values == report.values
    expected = evaluate_predictions(**columns(1, 4000))
    for name in METRICS:
        assert values[name] == pytest.approx(expected[name], rel=1e-12), name
    assert (values["rows"], values["positives"]) == (4000, expected["positives"])
    assert values["groups"]["total"] == len(np.unique(columns(1, 4000)["group"]))
    assert list(values["splits"]) == ["test", "valid"] and values["splits"]["test"]["auc"] == values["auc"]
    assert values["undefined"] == {} and values["ceiling"] == {"auc": 0.8091, "logloss": 0.2172}


def test_summary_is_one_sentence_with_the_result(run):
    summary = run[1].summary()
    assert f"AUC {run[1].values['auc']:.4f} (best possible 0.8091)" in summary
    assert "4,000 rows of test" in summary and "report.html" in summary and "\n" not in summary


def test_the_page_stands_alone_and_is_well_formed(run):
    html = (run[0] / "report.html").read_text()
    assert check_page(html).links == []


def test_every_plot_is_described_and_has_its_numbers(run):
    html = (run[0] / "report.html").read_text()
    page = Page(html)
    plots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(plots) == 10
    assert all(one["role"] == "img" and len(one["aria-label"]) > 20 and one["viewbox"] for one in plots)
    for figure in re.findall("<figure>.*?</figure>", html, re.DOTALL):
        assert "<figcaption>" in figure and "<table>" in figure and figure.count('scope="row"') > 1


def test_the_points_of_every_plot_are_in_report_json(run):
    values = json.loads((run[0] / "report.json").read_text())
    html = (run[0] / "report.html").read_text()
    plots = values["plots"]
    assert len(plots) == html.count("<svg") and all(plots.values())
    for plot in plots.values():
        for curve in plot.values():
            assert all(curve.values()) and all(isinstance(x, int | float) for axis in curve.values() for x in axis)
    roc = plots["roc"]["test"]
    assert np.trapezoid(roc["true positive rate"], roc["false positive rate"]) == pytest.approx(values["auc"], abs=2e-3)
    steps = [line for line in metrics_lines() if line["kind"] == "train"]
    assert plots["speed"]["reader wait"]["step"] == [line["step"] for line in steps]
    np.testing.assert_allclose(plots["loss"]["training"]["logloss"], [line["loss"] for line in steps], rtol=1e-5)


def test_plots_take_their_colours_from_the_page(run):
    html = (run[0] / "report.html").read_text()
    for plot in re.findall("<svg.*?</svg>", html, re.DOTALL):
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", plot) and "var(--ink)" in plot
    defined = {name: set(re.findall(r"--([\w-]+):", block)) for name, block in _colour_blocks(html).items()}
    used = set(re.findall(r"var\(--([\w-]+)\)", html)) - {"font"}
    assert used <= defined["light"] and used <= defined["dark"] and used <= defined["print"]


def _colour_blocks(html):
    light, dark, paper = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    return {"light": light, "dark": dark, "print": paper}


def test_curves_are_thinned(run):
    html = (run[0] / "report.html").read_text()
    longest = max(path.count("L") for path in re.findall(r'<path d="([^"]*)"', html, re.DOTALL))
    assert longest <= 2 * 500 and len(html) < 600_000


def test_text_of_the_run_is_shown_and_escaped(run):
    html = (run[0] / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "user_id    1,000    16  row-wise    32.0 KiB" in html and "DeepFM on made_up" in html
    assert ">torch</th><td>2.13.0<" in html and "train: left out 12 rows (label not 0 or 1)." in html
    for one in DEFINITIONS:
        assert f'id="card-{one.key}"' in html
    assert f"{run[1].values['gauc']:.4f}" in html


def test_the_same_run_gives_the_same_bytes(run):
    folder, _ = run
    before = {name: (folder / name).read_bytes() for name in ("report.html", "report.json")}
    code = f"from tessera.ctr.report.report import write_report; write_report({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_the_course_of_training_is_told(run):
    html = (run[0] / "report.html").read_text()
    lines = [line for line in metrics_lines() if line["kind"] == "train"]
    rows, speed = sum(line["rows"] for line in lines), np.median([line["samples_per_second"] for line in lines])
    assert f"Trained on {rows:,} rows in 2,000 steps and 100 seconds; {speed:,.0f} samples/s at the median." in html
    assert "Of 8 evaluations on valid, AUC was highest at step 2,000: 0.7892." in html


def test_predictions_alone_are_enough(tmp_path):
    values = columns(3, 500)
    del values["group"]
    write_predictions(tmp_path / "predictions", "a.parquet", values, "valid")
    report = write_report(tmp_path)
    assert report.values["split"] == "valid" and "splits" not in report.values and "ceiling" not in report.values
    assert report.values["gauc"] is None and report.values["undefined"] == {"gauc": "no group column"}
    html = (tmp_path / "report.html").read_text()
    Page(html)
    assert "no group column" in html and 'id="training"' not in html


@pytest.mark.parametrize("label, plots", [(0, 2), (1, 2)])
def test_one_class(tmp_path, label, plots):
    values = {**columns(3, 100), "label": np.full(100, label, np.float32)}
    write_predictions(tmp_path / "predictions", "a.parquet", values)
    report = write_report(tmp_path)
    assert report.values["auc"] is None and "AUC undefined" in report.summary()
    assert "undefined" in report.values and report.values["undefined"]["auc"] in (
        "no positives",
        "no negatives",
    )
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == plots and Page(html)


@pytest.mark.parametrize(("rows", "prediction"), [(1, 0.25), (2, 0.0), (2, 1.0), (50, 0.25)])
def test_few_rows_and_constant_predictions(tmp_path, prediction, rows):
    values = {**columns(3, rows), "prediction": np.full(rows, prediction, np.float32)}
    values["label"][:1] = 1
    values["label"][1:2] = 0
    write_predictions(tmp_path / "predictions", "a.parquet", values)
    report = write_report(tmp_path)
    assert report.values["auc"] == (None if rows == 1 else 0.5)
    Page((tmp_path / "report.html").read_text())


def test_rows_of_weight_zero_only(tmp_path):
    values = {**columns(3, 10), "weight": np.zeros(10, np.float32)}
    write_predictions(tmp_path / "predictions", "a.parquet", values)
    report = write_report(tmp_path)
    assert report.values["rows"] == 0 and report.values["undefined"]["auc"] == "no rows of positive weight"
    Page((tmp_path / "report.html").read_text())


def test_many_splits_with_odd_names(tmp_path):
    for day, name in enumerate(("$x_{", "_hidden", "<b>", "day=2026-01-04", "test", "a&b")):
        write_predictions(tmp_path / "predictions", f"{day}.parquet", columns(day, 200), name)
    report = write_report(tmp_path)
    assert report.values["split"] == "test" and len(report.values["splits"]) == 6
    html = (tmp_path / "report.html").read_text()
    assert "<b>" not in html and Page(html)


def test_a_given_teacher_goes_before_the_file(tmp_path):
    write_predictions(tmp_path / "predictions", "a.parquet", columns(3, 100), "test")
    given = {"auc": 0.9, "logloss": 0.1}
    assert write_report(tmp_path, teacher=given).values["ceiling"] == given
    assert write_report(tmp_path, teacher={"splits": {"test": given}}).values["ceiling"] == given
    assert "ceiling" not in write_report(tmp_path, teacher={"splits": {"day=1": given}}).values
    undefined = {"splits": {"test": {"auc": None, "logloss": 0.1}}}
    assert "ceiling" not in write_report(tmp_path, teacher=undefined).values


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("teacher.json", "{", "not JSON"),
        ("teacher.json", '{"auc": "high", "logloss": 1}', 'expected numbers "auc" and "logloss"'),
        ("teacher.json", "[1]", 'expected numbers "auc" and "logloss"'),
        ("versions.json", "[]", "expected a JSON object"),
        ("config.yaml", "a: [", "not YAML"),
        ("config.yaml", "a: 2024-13-45", "not YAML"),
        ("config.yaml", "a: !!int ''", "not YAML"),
        ("metrics.jsonl", "x\n", "line 1"),
    ],
)
def test_a_broken_file_is_named_and_nothing_is_written(tmp_path, name, content, message):
    write_predictions(tmp_path / "predictions", "a.parquet", columns(3, 100))
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        write_report(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*report*"))


def test_a_failure_while_writing_leaves_the_old_report(tmp_path, monkeypatch):
    write_predictions(tmp_path / "predictions", "a.parquet", columns(3, 100))
    write_report(tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    write_predictions(tmp_path / "predictions", "a.parquet", columns(4, 100))

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))


def script(*arguments):
    return run_script(str(ROOT / "scripts" / "report.py"), *map(str, arguments), place=Path("/"))


def test_the_script(tmp_path):
    write_predictions(tmp_path / "predictions", "a.parquet", columns(3, 100))
    done = script(tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("AUC ") and (tmp_path / "report.html").is_file()
    done = script(tmp_path / "absent")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'absent'}: no such folder; expected a run folder with predictions\n"


def test_the_document_of_metrics_names_every_number():
    text = (ROOT / "docs" / "metrics.md").read_text()
    for one in DEFINITIONS:
        assert f"| `{one.key}` |" in text and one.undefined in text
