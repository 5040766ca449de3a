"""Choices of `embedding` end to end: the same training on any number of ranks, the same scores from what was saved."""

import json
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower
from tessera.ctr.tables import build_tables
from tests.ctr.train.test_training import data, lines, train  # noqa: F401
from tests.ranks import run_script

LEARNED = ["embedding.oov=learned", "embedding.admission.kind=exact", "embedding.admission.threshold=3"]


def score(run: Path, output: Path) -> dict:
    done = run_script("scripts/evaluate.py", str(run), "--split", "test", "--output", str(output), world=2)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "report.json").read_text())


@pytest.mark.slow
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


@pytest.mark.slow
def test_learned_others_beside_learned_scales(tmp_path, data):  # noqa: F811
    done = train(tmp_path / "run", data, *LEARNED, "embedding.format=int8", "embedding.alpt.every=1",
                 "model.embedding_dim=16", world=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, again = json.loads((tmp_path / "run" / "report.json").read_text()), score(tmp_path / "run", tmp_path / "two")
    assert again["logloss"] == pytest.approx(first["logloss"], rel=1e-6)


FEATURES = (
    "data.schema.features=[{name: user}, {name: tags, kind: ids}, {name: long, kind: sequence, max_length: 100},"
    " {name: short, kind: sequence, max_length: 3}, {name: item, table: mixed},"
    " {name: items, kind: ids, max_length: 50, table: mixed}]"
)


@pytest.mark.parametrize(
    ("choice", "ranks", "expected"),
    [
        ("never", 4, []),
        ("always", 1, ["user", "tags", "long", "short", "mixed"]),
        ("auto", 1, []),  # nothing travels
        ("auto", 4, ["long", "mixed"]),  # 100 ids in a bag, and 51 in two, against 4 sums each; tags has no limit
        ("auto", 64, ["long"]),
        ("auto", 512, []),
    ],
)
def test_which_tables_pool_before_the_exchange(choice, ranks, expected):
    config = load_config([f"embedding.pooled_output_dist={choice}", FEATURES, "data.schema.time=null"], "")
    schema = Schema(config.data.schema)
    tables = build_tables(config, schema, build_tower(config, schema), ranks)
    assert [size.name for size in tables.sizes() if size.summed_by_owner] == expected
