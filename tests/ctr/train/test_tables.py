"""Choices of `embedding` end to end: the same training on any number of ranks, the same scores from what was saved."""

import json
from pathlib import Path

import pytest

from tests.ctr.train.test_training import data, lines, train  # noqa: F401
from tests.ranks import torchrun

LEARNED = ["embedding.others=learned", "embedding.admission.kind=exact", "embedding.admission.threshold=3"]


def score(run: Path, output: Path) -> dict:
    done = torchrun(2, "scripts/evaluate.py", str(run), "--split", "test", "--output", str(output))
    assert done.returncode == 0, done.stderr
    return json.loads((output / "report.json").read_text())


def test_learned_others(tmp_path, data):  # noqa: F811
    for world in (1, 2):
        done = train(tmp_path / str(world), data, *LEARNED, world=world)
        assert done.returncode == 0, done.stderr
    one, two = (lines(tmp_path / world, "train") for world in ("1", "2"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-5)
    zeros = train(tmp_path / "zeros", data, *LEARNED[1:])
    assert zeros.returncode == 0, zeros.stderr
    assert lines(tmp_path / "zeros", "train")[-1]["loss"] != pytest.approx(one[-1]["loss"], rel=1e-5)
    again, first = score(tmp_path / "1", tmp_path / "scores"), json.loads((tmp_path / "1" / "report.json").read_text())
    assert again["logloss"] == pytest.approx(first["logloss"], rel=1e-6)


def test_learned_others_beside_learned_step_sizes(tmp_path, data):  # noqa: F811
    done = train(tmp_path / "run", data, *LEARNED, "embedding.format=int8", "embedding.alpt.every=1",
                 "model.embedding_dim=16", world=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, again = json.loads((tmp_path / "run" / "report.json").read_text()), score(tmp_path / "run", tmp_path / "two")
    assert again["logloss"] == pytest.approx(first["logloss"], rel=1e-6)
