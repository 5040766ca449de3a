"""OptInter's search on data whose pairs are known: one that no product holds, one that a product is, and none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.config import load_config
from tessera.ctr.runs.score import run_config
from tessera.ctr.selection.interactions import SearchSettings, select_interactions
from tessera.ctr.selection.pair_information import gain_of
from tessera.embedding.errors import ConfigError
from tests.ranks import on_ranks

VALUES = {"a": 40, "b": 40, "c": 300, "d": 300, "e": 300, "f": 300}  # pairs of the last four are too rare to memorise
TRAIN, VALID = 120_000, 20_000
NAMES = list(VALUES)


def write_teacher(folder: Path, train: int = TRAIN, valid: int = VALID, labels: int = 1) -> None:
    """a, b: a random sign for each pair of ids; c, d: a product of two vectors of ids; e, f alone; all fields have a
    weight of their own."""
    drawn = np.random.default_rng(5)
    sign = drawn.choice([-1.0, 1.0], (VALUES["a"], VALUES["b"]))
    left, right = (drawn.normal(size=(VALUES["c"], 2)) for _ in range(2))
    own = {name: drawn.normal(size=VALUES[name]) * 0.3 for name in NAMES}
    for split, rows in (("train", train), ("valid", valid)):
        ids = {name: drawn.integers(0, VALUES[name], rows) for name in NAMES}
        logit = sum(own[name][ids[name]] for name in NAMES)
        logit = logit + 1.5 * sign[ids["a"], ids["b"]] + 1.2 * (left[ids["c"]] * right[ids["d"]]).sum(1)
        chance = 1 / (1 + np.exp(-logit))
        columns = {f"label{k or ''}": (drawn.random(rows) < chance).astype(np.int8) for k in range(labels)}
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table(columns | ids), folder / split / "part.parquet", row_group_size=8192)


def job(folder: Path, *overrides: str) -> list[str]:
    features = ",".join(f"{{name: {name}}}" for name in NAMES)
    fixed = ["model=optinter", "data=synthetic", f"data.schema.features=[{features}]", "data.test=null"]
    fixed += ["data.schema.time=null", f"data.path={folder / 'data'}", "trainer.device=cpu", "trainer.threads=1"]
    fixed += ["model.hidden=[32]", "model.embedding_dim=8", "model.pair_dim=4", "trainer.batch_size=1000"]
    return [*fixed, "trainer.checkpoint.every=100000", "trainer.log_every=60", *overrides]


def search(process, folder: Path, target: str, settings: SearchSettings, *overrides: str):
    return select_interactions(load_config(job(folder, *overrides), ""), process, folder / target, settings)


def test_gain_is_that_of_the_pair_alone():
    drawn = np.random.default_rng(1)
    a, b, c = (drawn.integers(0, 6, 40_000) for _ in range(3))
    label = drawn.random(40_000) < np.where((a + b) % 2 == 0, 0.8, 0.2)  # of which neither a nor b alone says a thing
    entropy = -0.8 * np.log(0.8) - 0.2 * np.log(0.2)
    assert gain_of(a, b, label, 20) == pytest.approx(np.log(2) - entropy, abs=0.01)
    assert gain_of(a, c, label, 20) == pytest.approx(0, abs=1e-3)
    rare = np.arange(40_000)  # each id once: without the threshold it would say all
    assert gain_of(rare, c, label, 20) == pytest.approx(0, abs=1e-3)


MISTAKES = {
    "model.factorise=[[a, b]]": "model.factorise is set, so nothing is searched; expected null",
    "embedding=static": "embedding.kind is static; expected dynamic",
    "data.valid=null": "data.valid is null; expected a split that says when the search is at its best",
    "selection.method=lpfs": "selection.method is lpfs; expected none",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line(override, tmp_path):
    with pytest.raises(ConfigError, match=MISTAKES[override].replace("[", r"\[")):
        search(None, tmp_path, "out", SearchSettings(), override)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SearchSettings(pairs=0), "--pairs is 0; expected at least 1"),
        (SearchSettings(information=0), "--by-information is 0; expected at least 1"),
        (SearchSettings(lr=0.0), "--lr is 0.0; expected a number above 0"),
    ],
)
def test_a_wrong_number_is_one_line(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        search(None, tmp_path, "out", settings)


def test_another_model_does_not_search(tmp_path):
    with pytest.raises(ConfigError, match="model.target is .*; expected model=optinter, which searches"):
        config = load_config(["model=dnn", "data=synthetic"], "")
        select_interactions(config, None, tmp_path / "out", SearchSettings())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_search_memorises_what_no_product_holds(tmp_path, capsys):
    write_teacher(tmp_path / "data")
    settings = SearchSettings(lr=0.02, threshold=5, information=1)
    rates = ("optimizer.dense.lr=0.003", "trainer.epochs=2")
    on_ranks(1, search, tmp_path, "out", settings, *rates)
    told = json.loads((tmp_path / "out" / "interactions.json").read_text())
    ways = {"".join(one["fields"]): one for one in told["pairs"]}
    aucs = {name: run["valid"]["auc"] for name, run in told["runs"].items()}
    with capsys.disabled():
        for name, one in ways.items():
            print(name, one["choice"], *(f"{one[k]:.3f}" for k in ("memorise", "factorise", "naive", "information")))
        print(aucs, told["counts"])
    assert ways["ab"]["memorise"] > 0.7 and ways["cd"]["factorise"] > 0.7
    others = [one for name, one in ways.items() if name not in ("ab", "cd")]
    counts = [sum(one["choice"] == way for one in others) for way in ("memorise", "factorise", "naive")]
    assert counts[2] > counts[0] + counts[1] and ways["ef"]["choice"] == "naive"
    assert max(ways, key=lambda name: ways[name]["information"]) == "ab"  # counts see it, and not the product
    assert ways["cd"]["information"] < 0
    assert aucs["retrain"] > aucs["search"] > aucs["by-information"]


def search_twice(process, folder: Path) -> None:
    of_two = ("data.schema.labels=[label, label1]", "trainer.early_stop.metric=label.auc")
    settings = SearchSettings(pairs=2, lr=0.05, threshold=2, rows=3000)
    first = search(process, folder, f"on-{process.world_size}", settings, *of_two)
    again = search(process, folder, f"on-{process.world_size}", settings, *of_two)  # all runs are kept
    assert first == again


@pytest.mark.slow
def test_two_labels_on_two_ranks_choose_as_on_one_and_the_files_are_the_retrained_run(tmp_path):
    write_teacher(tmp_path / "data", 6000, 2000, labels=2)
    told = []
    for world in (1, 2):
        on_ranks(world, search_twice, tmp_path)
        told.append(json.loads((tmp_path / f"on-{world}" / "interactions.json").read_text()))
    for one, two in zip(told[0]["pairs"], told[1]["pairs"], strict=True):
        assert one["fields"] == two["fields"]
        for way in ("memorise", "factorise", "naive", "information"):
            assert one[way] == pytest.approx(two[way], abs=2e-3)
    assert {tuple(one["fields"]) for one in told[0]["pairs"] if one["memorise"]} == {
        tuple(one["fields"]) for one in sorted(told[0]["pairs"], key=lambda one: -one["information"])[:2]
    }
    made = load_config([*told[0]["retrain"], "optimizer=adam_adagrad"], "")
    trained = run_config(tmp_path / "on-1" / "retrain", [])
    assert (made.model, made.data, made.embedding) == (trained.model, trained.data, trained.embedding)
