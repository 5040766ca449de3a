"""A run's rows to int8 and back by the command: errors are reported, the new run is scored, mistakes are one line."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tests.ranks import run_script

SMALL = ["data=synthetic", "model.hidden=[16]", "model.embedding_dim=8", "embedding.rows=500", "embedding.init_std=0.1"]
SMALL += ["trainer.batch_size=250", "trainer.device=cpu", "optimizer.sparse.name=adam", "optimizer.sparse.lr=0.01"]


def call(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return run_script(f"scripts/{script}", *map(str, arguments))


def score(run: Path) -> dict:
    done = call("evaluate.py", run, "--output", run / "evaluations" / "scored")
    assert done.returncode == 0, done.stderr
    return json.loads((run / "evaluations" / "scored" / "report.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    write_synthetic(SyntheticConfig(rows=2000), folder / "data")
    done = call("train.py", *SMALL, f"data.path={folder / 'data'}", f"trainer.run_dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_to_int8_and_back(trained):
    int8, back = trained.parent / "int8", trained.parent / "back"
    done = call("convert_tables.py", trained, int8, "format=int8", "alpt.every=4")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " v: " in line]
    assert len(lines) == 26
    for line in lines:
        value, error, largest = (float(x) for x in re.findall(r"(?:value|error) ([0-9.e+-]+)", line))
        assert 0 < error < value / 100 and error < largest < value
    first, converted = score(trained), score(int8)
    assert converted["rows"] == first["rows"]
    assert converted["logloss"] == pytest.approx(first["logloss"], abs=2e-3)
    assert converted["logloss"] != first["logloss"]
    done = call("convert_tables.py", int8, back, "format=fp32", "alpt.every=null")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rms error 0.00e+00") == 52, "float32 holds what int8 held"
    assert score(back)["logloss"] == pytest.approx(converted["logloss"], rel=1e-6)


@pytest.mark.slow
def test_mistakes_are_one_line(trained, tmp_path):
    def error(*arguments):
        done = call("convert_tables.py", *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "is not a run folder" in error(tmp_path, tmp_path / "a", "format=int8")
    (tmp_path / "thesis").write_text("mine")
    assert "it holds thesis and no record" in error(trained, tmp_path, "format=int8")
    assert "embedding.format is 'int3'; expected fp32, fp16" in error(trained, tmp_path / "a", "format=int3")
    assert "a conversion changes the format of rows" in error(trained, tmp_path / "a", "rows=5")
    assert "expected embedding.tables.C1.format, " in error(trained, tmp_path / "a", "tables.C1.ttl_days=5")
    path = next((trained / "best" / "rows" / "C1").iterdir())
    stored = path.read_bytes()
    path.write_bytes(stored[:-9])
    try:
        message = error(trained, tmp_path / "a", "format=int8")
    finally:
        path.write_bytes(stored)
    assert f"rows/C1/{path.name}" in message and "bytes" in message
    assert not (tmp_path / "a").exists()
