"""Reading metrics.jsonl, with what crashes and restarts leave in it."""

import json

import numpy as np
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.report.history import read_history
from tests.ctr.report.run_folder import metrics_lines


def write(path, *lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_series_by_kind_and_split(tmp_path):
    history = read_history(write(tmp_path / "metrics.jsonl", *metrics_lines(500)))
    np.testing.assert_array_equal(history.train["step"], np.arange(10, 501, 10))
    assert history.evaluations["valid"]["step"].tolist() == [250, 500]
    assert history.evaluations["test"]["auc"].tolist() == [0.788]
    assert history.left_out == {"train": {"label not 0 or 1": 12}}


def test_steps_logged_twice_after_a_restart(tmp_path):
    losses = [(10, 0.5), (20, 0.4), (30, 0.3), (20, 0.41), (30, 0.31), (40, 0.2)]
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in losses]
    evaluations = [{"kind": "eval", "split": "valid", "step": 40, "auc": auc} for auc in (0.7, 0.75)]
    history = read_history(write(tmp_path / "metrics.jsonl", *lines, *evaluations))
    assert history.train["loss"].tolist() == [0.5, 0.41, 0.31, 0.2]
    # The second evaluation at one step is that of the best model, when all is done.
    assert history.evaluations["valid"]["auc"].tolist() == [0.7]


def test_what_is_missing_or_undefined_is_a_gap(tmp_path):
    lines = [{"kind": "train", "step": 1, "loss": None}, {"kind": "train", "step": 2, "loss": float("nan")}]
    history = read_history(write(tmp_path / "metrics.jsonl", *lines, {"kind": "later", "step": 1}))
    assert np.isnan(history.train["loss"]).all() and np.isnan(history.train["dense_lr"]).all()


def test_no_log_and_a_last_line_cut_off(tmp_path):
    assert read_history(tmp_path / "absent.jsonl").train == {}
    path = write(tmp_path / "metrics.jsonl", {"kind": "train", "step": 1, "loss": 0.5}, tail='{"kind": "tra')
    assert read_history(path).train["step"].tolist() == [1]


@pytest.mark.parametrize(
    "line", ["{broken", "[]", '{"step": 1}', '{"kind": "train"}', '{"kind": "train", "step": "1"}']
)
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2") as caught:
        read_history(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
