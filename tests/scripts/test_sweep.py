"""The sweep's table: mean and deviation over seeds, ordered by the valid split; a finished run is not repeated."""

import sys

import pytest

from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.embedding.errors import ConfigError
from tessera.scripts.sweep import _choices, main, table


def scores(valid: float, test: float) -> dict[str, float]:
    return {"valid auc": valid, "valid logloss": 0.5, "test auc": test, "test logloss": 0.25}


def test_the_table_is_ordered_by_the_valid_split():
    results = {"a": [scores(0.7, 0.9), scores(0.72, 0.9)], "b": [scores(0.8, 0.6), scores(0.8, 0.7)]}
    lines = table(results, "auc").splitlines()
    assert lines[2] == "| b | 2 | 0.8000 ± 0.0000 | 0.5000 ± 0.0000 | 0.6500 ± 0.0707 | 0.2500 ± 0.0000 |"
    assert lines[3].startswith("| a | 2 | 0.7100 ± 0.0141 |")


def test_values_with_commas_of_their_own():
    assert _choices("model.hidden=[4,4],[8]") == ["model.hidden=[4,4]", "model.hidden=[8]"]
    with pytest.raises(ConfigError, match="--grid 'model.hidden'; expected key=value,value"):
        _choices("model.hidden")


@pytest.mark.slow
def test_a_sweep_runs_once_and_goes_on(tmp_path, capsys):
    write_synthetic(SyntheticConfig(rows=1000), tmp_path / "data")
    small = ["data=synthetic", f"data.path={tmp_path}/data", "model=lr", "embedding.rows=100", "trainer.batch_size=250"]
    arguments = ["--output", str(tmp_path / "sweep"), "--seeds", "1", "2", "--grid", "optimizer.sparse.lr=0.1"]
    arguments += ["--", *small, "trainer.device=cpu"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert first.err.count("scripts/train.py") == 2
    assert (tmp_path / "sweep" / "table.md").read_text() in first.out
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "train.py" not in again.err


def test_a_mistake_in_the_grid_trains_nothing(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "sweep"), "--grid", "model.hiden=[4]", "--launcher", sys.executable]) == 2
    assert "unknown key 'model.hiden'" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_undefined_scores_stand_last_and_say_so():
    undefined = {**scores(0.0, 0.9), "valid auc": None}
    lines = table({"a": [undefined, scores(0.9, 0.9)], "b": [scores(0.6, 0.6)]}, "auc").splitlines()
    assert lines[2].startswith("| b |") and lines[3].startswith("| a | 2 | undefined | 0.5000")


def test_a_sweep_needs_a_valid_split(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "sweep"), "--", "data=synthetic", "data.path=/x", "data.valid=null"]) == 2
    assert "data.valid is null" in capsys.readouterr().err and not (tmp_path / "sweep").exists()
