"""Two runs on the same rows: found whatever files they lie in, refused where they differ; page, JSON, command."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics.compare import PairedRows, auc_difference
from tessera.ctr.metrics.exact import evaluate_predictions
from tessera.ctr.report.comparison import compare_runs
from tests.ctr.report.daily_folder import HELD, day_columns, make_daily_run
from tests.ctr.report.html_page import check_page
from tests.ctr.report.run_folder import write_predictions
from tests.ranks import ROOT, run_script


def write_run(folder: Path, values: dict, files: int = 1, seed: int | None = None, split: str = "test") -> Path:
    """Predictions over some files, in an order of their own if a seed is given."""
    rows = len(values["label"])
    order = np.arange(rows) if seed is None else np.random.default_rng(seed).permutation(rows)
    for number, part in enumerate(np.array_split(order, files)):
        chosen = {name: column[part] for name, column in values.items()}
        write_predictions(folder / "predictions", f"{split}-{number:05d}.parquet", chosen, split)
    return folder


def runs(tmp_path, **changed):
    first, second = day_columns(1, 2000, noise=0.5), day_columns(1, 2000, noise=0.45)
    second |= changed
    return write_run(tmp_path / "old", first), write_run(tmp_path / "new", second)


def test_rows_are_paired_whatever_files_and_order_they_lie_in(tmp_path):
    first, second = runs(tmp_path)
    ahead = compare_runs(first, second, tmp_path / "out", replicates=50).values
    columns = [day_columns(1, 2000, noise=noise) for noise in (0.5, 0.45)]
    rows = PairedRows(columns[0]["prediction"], columns[1]["prediction"], columns[0]["label"] == 1)
    expected = auc_difference(rows)
    closed = ahead["differences"]["auc"]["closed_form"]
    assert closed == pytest.approx(vars(expected)) and ahead["differences"]["auc"]["difference"] == expected.value
    shuffled = write_run(tmp_path / "third", columns[1], files=3, seed=1)
    again = compare_runs(first, shuffled, tmp_path / "out2", replicates=50).values
    assert again["differences"] == ahead["differences"]  # the bootstrap's, too: it is keyed by the place of a row
    for name, one in zip(("first", "second"), columns, strict=True):
        plain = evaluate_predictions(one["prediction"], one["label"])
        assert ahead[name]["auc"] == pytest.approx(plain["auc"]) and ahead[name]["rows"] == 2000


def test_the_page_and_the_line(tmp_path):
    first, second = runs(tmp_path)
    comparison = compare_runs(first, second, tmp_path / "out", replicates=200, confidence=0.9, seed=4)
    values = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert values == comparison.values
    assert values["settings"] == {"split": "test", "replicates": 200, "confidence": 0.9, "resampled": "rows", "seed": 4}
    html = (tmp_path / "out" / "comparison.html").read_text()
    check_page(html)
    assert html.count("<svg") == len(values["plots"]) == 3 and "new against old" in html
    line = comparison.summary()
    assert line.startswith("new against old on 2,000 rows of test: AUC 0.") and "\n" not in line
    bootstrap = values["differences"]["auc"]["bootstrap"]
    ends = f"90% interval {bootstrap['low']:+.5f} to {bootstrap['high']:+.5f}"
    assert ends.replace("-", "−") in line
    before = (tmp_path / "out" / "comparison.html").read_bytes()
    compare_runs(first, second, tmp_path / "out", replicates=200, confidence=0.9, seed=4)
    assert (tmp_path / "out" / "comparison.html").read_bytes() == before


def test_without_replicates_the_closed_forms_remain(tmp_path):
    values = compare_runs(*runs(tmp_path), tmp_path / "out", replicates=0).values
    assert "bootstrap" not in values["differences"]["auc"] and list(values["plots"]) == ["roc"]
    closed = values["differences"]["auc"]["closed_form"]
    assert f"{closed['low']:+.5f}".replace("-", "−") in values["summary"]


def test_weights_and_groups(tmp_path):
    weight = np.random.default_rng(0).integers(0, 3, 2000).astype(np.float32)
    first, second = day_columns(1, 2000, noise=0.5), day_columns(1, 2000, noise=0.45)
    for one in (first, second):
        one["weight"] = weight
    folders = [write_run(tmp_path / name, one, seed=3) for name, one in (("a", first), ("b", second))]
    values = compare_runs(*folders, tmp_path / "out", replicates=20).values
    expected = evaluate_predictions(second["prediction"], second["label"], weight)
    assert values["second"]["auc"] == pytest.approx(expected["auc"]) and values["second"]["rows"] == expected["rows"]
    grouped = compare_runs(*folders, tmp_path / "out", replicates=20, by_group=True).values
    assert grouped["settings"]["resampled"] == "groups"
    errors = [one["differences"]["auc"]["closed_form"]["standard_error"] for one in (values, grouped)]
    assert errors[0] != errors[1] and errors[1] == pytest.approx(errors[0], rel=0.3)  # groups are random here


def test_one_class(tmp_path):
    zeros = np.zeros(2000, np.float32)
    first = write_run(tmp_path / "a", {**day_columns(1, 2000), "label": zeros})
    second = write_run(tmp_path / "b", {**day_columns(1, 2000, noise=0.4), "label": zeros})
    values = compare_runs(first, second, tmp_path / "out", replicates=5).values
    assert list(values["differences"]) == ["logloss"] and "difference in AUC undefined" in values["summary"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    check_page(page)
    assert 'id="card-auc"' in page and '<div class="undefined">undefined</div>' in page


def _label(at):
    label = day_columns(1, 2000)["label"].copy()
    label[at] = 1 - label[at]
    return label


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"label": _label([7, 9])}, "label of row 7 of test is"),
        ({"weight": np.full(2000, 2.0)}, "weight of row 0 of test is 1 in one and 2 in the other (2,000 such rows)"),
        ({"row": np.arange(2000) + 5}, "10 rows are in one alone, the first is row 0; expected both to score the same"),
        ({"row": np.minimum(np.arange(2000), 1990)}, "row 1990 of test stands twice"),
        ({"row": np.arange(2000) / 2}, "column row is double; expected integers"),
        ({"row": pa.array([None, *range(1, 2000)])}, "column row has 1 nulls; expected none"),
    ],
)
def test_rows_that_are_not_the_same_are_refused(tmp_path, changed, message):
    first, second = write_run(tmp_path / "old", day_columns(1, 2000)), tmp_path / "new" / "predictions"
    write_predictions(second, "test-00000.parquet", {**day_columns(1, 2000), **changed}, "test")
    with pytest.raises(DataError) as caught:
        compare_runs(first, tmp_path / "new", tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(second) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_said(tmp_path):
    first, second = runs(tmp_path)
    other = write_run(tmp_path / "valid-only", day_columns(1, 100), split="valid")
    short = {name: values for name, values in day_columns(1, 2000).items() if name not in ("row", "group")}
    old = write_run(tmp_path / "before", short)
    daily = make_daily_run(tmp_path / "daily", days=2, rows=100)
    late = make_daily_run(tmp_path / "late", days=2, rows=100)
    (late / "days" / "2026-01-03").rename(late / "days" / "2027-01-03")
    shutil.rmtree(late / "days" / "2026-01-04")
    for pair, split, message in (
        ((first, other), None, "expected a split that both have"),
        ((first, second), "valid", "no row of split valid; the splits there are: test"),
        ((first, old), None, "no column row; found"),
        ((first, daily), None, "is a folder of daily retraining and"),
        ((daily, late), None, "none of them in common"),
        ((first, tmp_path / "absent"), None, "no such folder"),
        ((first, ROOT / "docs"), None, "no such folder"),
    ):
        with pytest.raises(DataError) as caught:
            compare_runs(*pair, tmp_path / "out", split=split)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no column group"):
        shorter = write_run(tmp_path / "c", {**short, "row": np.arange(2000)})
        compare_runs(shorter, shorter, tmp_path / "out", by_group=True)
    assert not (tmp_path / "out").exists()


def compared(*arguments: Path | str) -> CompletedProcess:
    return run_script(str(ROOT / "scripts" / "compare.py"), *map(str, arguments), place=Path("/"))


def test_daily_runs_are_compared_over_all_days_in_common_by_the_command(tmp_path):
    first = make_daily_run(tmp_path / "a" / "daily", days=10, rows=300)
    second = make_daily_run(tmp_path / "b" / "daily", days=11, rows=300, noise=0.4)
    done = compared(first, second, "--replicates", "100")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("b/daily against a/daily on 3,000 rows of 10 days: AUC") and done.stdout.count("\n") == 1
    )
    folder = second / "comparisons" / "daily"
    values = json.loads((folder / "comparison.json").read_text())
    assert [day["partition"] for day in values["days"]] == [f"2026-01-{day:02d}" for day in range(3, 13)]
    columns = [day_columns(HELD, 300, noise, shift=1.5) for noise in (0.5, 0.4)]
    expected = auc_difference(PairedRows(*(one["prediction"] for one in columns), columns[0]["label"] == 1))
    assert values["days"][HELD]["auc"]["low"] == pytest.approx(expected.low)
    mean = values["mean_of_days"]["auc"]
    assert mean["difference"] == pytest.approx(np.mean([day["auc"]["difference"] for day in values["days"]]))
    assert mean["low"] < mean["difference"] < mean["high"] and mean["days"] == 10
    html = (folder / "comparison.html").read_text()
    check_page(html)
    assert f"only {second} has them: 2026-01-13" in html and "difference-by-day" in values["plots"]


def test_the_command_says_what_is_wrong_in_a_line(tmp_path):
    first, second = runs(tmp_path, label=_label([3]))
    done = compared(first, second)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "label of row 3" in done.stderr
