"""The commands themselves, on targets that are not theirs: one line, status 2, nothing touched; on their own: replaced.

tests/ctr/test_output_folders.py has the rule's cases; these show that each command keeps to it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tessera.ctr.output_folders import RECORD
from tests.ctr.test_output_folders import tree
from tests.ctr.train.states import arguments, write_data
from tests.ranks import run_script


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """data/, and run/ trained on it."""
    folder = tmp_path_factory.mktemp("targets")
    data = write_data(folder / "data", 200)
    command = arguments(data, folder / "run", "trainer.batch_size=50", "trainer.checkpoint.every=2")
    done = run_script("scripts/train.py", *command)
    assert done.returncode == 0, done.stderr
    return folder


def refused(place: Path, script: str, *command: object) -> str:
    before = tree(place)
    done = run_script(f"scripts/{script}", *map(str, command))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert tree(place) == before
    return done.stderr


def done(script: str, *command: object) -> None:
    result = run_script(f"scripts/{script}", *map(str, command))
    assert result.returncode == 0, result.stderr


def test_evaluate(place):
    run, target = place / "run", place / "scored"
    options = ["data.test=valid", "--output"]
    for output, expected in ((run, "is"), (run / "best", "lies inside"), (place, "contains"), (place / "data", "is")):
        assert f"--output {output} {expected} " in refused(place, "evaluate.py", run, *options, output)
    for _ in range(2):  # the second replaces the first
        done("evaluate.py", run, *options, target)
        assert json.loads((target / RECORD).read_text())["command"] == "evaluate.py"
        assert "<title>scored" in (target / "report.html").read_text() and not list(place.glob(".*"))
    (target / "notes.txt").write_text("mine")
    assert "it holds notes.txt, which evaluate.py did not write" in refused(place, "evaluate.py", run, *options, target)


def test_convert_tables(place):
    run, target = place / "run", place / "int8"
    assert "OUTPUT" in refused(place, "convert_tables.py", run, run / "int8", "format=int8")
    assert "is not replaced: it holds " in refused(place, "convert_tables.py", run, place / "data", "format=int8")
    for _ in range(2):
        done("convert_tables.py", run, target, "format=int8", "alpt.every=2")
    done("evaluate.py", target, "data.test=valid")  # somebody works with it
    assert "it holds evaluations/" in refused(place, "convert_tables.py", run, target, "format=fp16")


def test_compare(place):
    run, other, target = place / "run", place / "other", place / "compared"
    shutil.copytree(run, other, dirs_exist_ok=True)
    for output in (run, other / "x", place):
        assert "which is read" in refused(place, "compare.py", run, other, "--output", output, "--replicates", 0)
    for _ in range(2):
        done("compare.py", run, other, "--output", target, "--replicates", 0)
        done("compare.py", run, other, "--replicates", 0)
    assert (other / "comparisons" / "run" / "comparison.html").exists()
    (target / "comparison.md").write_text("mine")
    message = refused(place, "compare.py", run, other, "--output", target, "--replicates", 0)
    assert "it holds comparison.md, which compare.py did not write" in message


def test_train(place):
    data, states = place / "data", place / "run" / "checkpoints"
    assert f"trainer.run_dir {data}/train/run lies inside {data}/train" in refused(
        place, "train.py", *arguments(data, data / "train" / "run")
    )
    (place / "others").mkdir()
    (place / "others" / "thesis").write_text("mine")
    for more, expected in ((), "is not empty; expected a new folder"), (["trainer.resume=auto"], "holds no run"):
        assert expected in refused(place, "train.py", *arguments(data, place / "others", *more))
    command = arguments(data, place / "new", f"trainer.checkpoint.folder={states}")
    assert f"trainer.checkpoint.folder {states} holds step-" in refused(place, "train.py", *command)
    command = arguments(data, place / "new", f"trainer.checkpoint.folder={data}/train/states")
    said = refused(place, "train.py", *command)
    assert f"trainer.checkpoint.folder {data}/train/states lies inside {data}/train" in said


def test_sweep(place):
    small = arguments(place / "data", place / "unused", "trainer.batch_size=50", "trainer.max_steps=2")
    command = ["--seeds", "1", "--", *(one for one in small if not one.startswith("trainer.run_dir"))]
    (place / "mine").mkdir()
    (place / "mine" / "table.md").write_text("mine")
    assert "it holds table.md and no record" in refused(place, "sweep.py", "--output", place / "mine", *command)
    assert "lies inside" in refused(place, "sweep.py", "--output", place / "data" / "sweep", *command)
