"""`tessera tune`: mistakes end in one line before anything is trained; a search trains, ends trials and goes on."""

import importlib.util
import json

import pytest

from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.scripts.tune import main


def test_without_optuna_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--output", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err == "error: tessera tune needs optuna: pip install tessera-ctr[tune]\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", "0"], "--trials is 0; expected 1 or more"),
        pytest.param(["--", "data.valid=null"], "data.valid is null; expected a split", marks=pytest.mark.slow),
        pytest.param(["--", "trainer.run_dir=a"], "trainer.run_dir is a; expected none", marks=pytest.mark.slow),
        pytest.param(["--space", "depfm"], "no space 'depfm'; did you mean 'deepfm'?", marks=pytest.mark.slow),
        pytest.param(["--", "model.dropot=1"], "unknown key 'model.dropot'", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_trains_nothing(tmp_path, capsys, arguments, said):
    pytest.importorskip("optuna")
    before, dashes, after = " ".join(arguments).partition("-- ")
    assert main(["--output", str(tmp_path / "a"), *before.split(), "--", "data.path=/x", *after.split()]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_search_trains_and_goes_on(tmp_path, capsys):
    pytest.importorskip("optuna")
    write_synthetic(SyntheticConfig(rows=1000), tmp_path / "data")
    (tmp_path / "space.yaml").write_text("optimizer.sparse.lr: {low: 0.01, high: 0.5, log: true}\n")
    job = ["data=synthetic", f"data.path={tmp_path}/data", "model=lr", "embedding.rows=100", "trainer.batch_size=250"]
    job += ["trainer.device=cpu", "trainer.epochs=2"]
    output = tmp_path / "tune"

    def call(trials: int) -> str:
        arguments = ["--output", str(output), "--trials", str(trials), "--space", str(tmp_path / "space.yaml")]
        assert main([*arguments, "--", *job]) == 0
        return capsys.readouterr().out

    call(1)
    said = call(2)
    assert "trial 1 · complete" in said and "trial 0 ·" not in said
    told = json.loads((output / "report.json").read_text())
    assert [one["number"] for one in told["trials"]] == [0, 1] and told["trials"][0]["values"]["optimizer.sparse.lr"]
    kept = [one["number"] for one in told["trials"] if (output / f"trial-{one['number']:04d}" / "best").exists()]
    assert kept == [told["best"]]
    assert not list(output.glob("trial-*/checkpoints"))
