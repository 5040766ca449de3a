"""Exports of models that see events one by one score as evaluation does, on awkward histories too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist

from tessera.ctr.config import load_config
from tessera.ctr.export.dry_run import check_export
from tessera.ctr.export.tower import ServedTower, graph_of
from tessera.ctr.serving import RowError, Scorer
from tessera.ctr.serving import events as events_of
from tessera.embedding.errors import ConfigError
from tests.ctr.export import models
from tests.ctr.export.graphs import check_graph
from tests.ctr.export.models import export, make_run
from tests.ctr.export.test_parity import evaluated
from tests.ctr.models.names import SEQUENCE_MODELS
from tests.ctr.models.test_sequence_models import FIELDS, tower_of
from tests.distributed.saved_tables import alone

FEATURES = (
    "data.schema.features=["
    "{name: x, kind: numeric}, {name: user}, {name: item}, {name: words, kind: ids, dtype: string, pooling: mean}, "
    "{name: items, kind: sequence, pooling: none, align: h, table: item, max_length: 5}, "
    "{name: actions, kind: sequence, pooling: none, align: h, max_length: 5, missing_id: -7}, "
    "{name: ages, kind: sequence, dtype: float, pooling: none, align: h, max_length: 5, transform: log1p, missing: 2}"
    "MORE]"
)
OTHERS = ", {name: seen, kind: sequence, pooling: none, table: item, max_length: 3, delimiter: '|'}"
SMALL = {
    "bst": ["model.hidden=[8]", "model.width=6", "model.heads=2", "model.feed_forward=5"],
    "dien": ["model.hidden=[8]", "model.attention_hidden=[6]"],
    "din": ["model.hidden=[8]", "model.attention_hidden=[6]", "model.softmax=true"],
    "dare": ["model.hidden=[8]", "model.attention_dim=3", "model.top_k=2"],
    "hstu": ["model.width=8", "model.heads=2", "model.qk_dim=3", "model.v_dim=3", "model.layers=2"]
    + ["model.preprocessor=6", "model.head_hidden=5"],
}
CASES = {
    "bst": ("bst", ()),
    "bst, the target alone": ("bst", ("model.pooling=target",)),
    "dien": ("dien", ()),
    "din": ("din", ()),
    "din of two groups": ("din", ("model.softmax=false", "embedding.oov=learned")),
    "dare": ("dare", ("embedding.formats={actions.a: int8}",)),
    "hstu": ("hstu", ("numeric=autodis",)),
    "hstu, raw numbers, amp": ("hstu", ("numeric=raw", "model.form=research", "trainer.amp=true")),
}


@pytest.fixture(scope="module")
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield alone()
    dist.destroy_process_group()


def awkward(count: int, seed: int = 0) -> pa.Table:
    """Rows with empty, missing and long histories, events that lack an id or a number, and unknown ids."""
    draw = np.random.default_rng(seed)

    def some(values: list, share: float = 0.15) -> list:
        return [None if draw.random() < share else value for value in values]

    lengths = draw.integers(0, 9, count) * (draw.random(count) < 0.8)
    gone = draw.random(count) < 0.1

    def events(make) -> list:
        return [None if out else make(int(n)) for out, n in zip(gone, lengths, strict=True)]

    return pa.table(
        {
            "label": pa.array(draw.integers(0, 2, count)),
            "x": pa.array(draw.normal(size=count)),
            "user": pa.array(draw.integers(-20, 20, count)),
            "item": pa.array(some(draw.integers(0, 40, count).tolist()), pa.int64()),
            "words": pa.array([[f"w{i}" for i in draw.integers(0, 9, n % 4)] for n in lengths], pa.list_(pa.string())),
            "items": pa.array(events(lambda n: some(draw.integers(0, 60, n).tolist())), pa.list_(pa.int64())),
            "actions": pa.array(events(lambda n: some(draw.integers(0, 4, n).tolist())), pa.list_(pa.int32())),
            "ages": pa.array(events(lambda n: some(draw.gamma(1, 9, n).tolist())), pa.list_(pa.float32())),
            "seen": pa.array(some(["|".join(map(str, draw.integers(0, 60, n % 6))) for n in lengths])),
        }
    )


def make(process, folder: Path, model: str, monkeypatch, *more: str, others: bool = False):
    monkeypatch.setattr(models, "awkward_rows", awkward)
    features = FEATURES.replace("MORE", OTHERS if others else "")
    return make_run(
        process,
        folder,
        [
            *("data=synthetic", features, "data.schema.time=null", f"model={model}", "model.embedding_dim=4"),
            *(*SMALL[model], f"data.path={folder}/data", "embedding.init_std=0.4", "embedding.rows=400"),
            *("trainer.device=cpu", "trainer.threads=1", "data.lanes=4", "data.window_rows=64"),
            *("trainer.batch_size=60", *more),
        ],
    )


def test_no_model_of_sequences_is_forgotten():
    assert {model for model, _ in CASES.values()} == set(SMALL) == set(SEQUENCE_MODELS)


def check(process, folder: Path, bound: float = 1e-6) -> Scorer:
    exported = export(process, folder)
    assert exported.difference <= bound, exported.difference
    scorer, rows = Scorer.load(folder / "export", check=True), awkward(300, seed=5)
    expected = evaluated(process, folder, rows)
    assert np.abs(scorer(rows) - expected).max() <= bound and expected.std() > 0.01
    assert np.abs(scorer(rows.to_pylist()) - expected).max() <= bound
    return scorer


@pytest.mark.parametrize("case", ["din", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "din")])
def test_scores_are_those_of_evaluation(process, tmp_path, monkeypatch, case):
    model, more = CASES[case]
    make(process, tmp_path, model, monkeypatch, *more, others=case == "din of two groups")
    scorer = check(process, tmp_path, 2e-2 if "amp" in case else 1e-6)
    if case != "din":
        return
    rows = awkward(40, seed=8)
    expected = scorer(rows)
    # No events at all, one row alone, passes of few rows: the graph takes any number.
    empty = rows.drop_columns(["items", "actions", "ages"]).to_pylist()
    for row in empty:
        row.update(items=[], actions=[], ages=None)
    assert np.isfinite(scorer(empty)).all() and scorer([]).shape == (0,)
    alone_ = [float(scorer(rows.slice(place, 1))[0]) for place in range(40)]
    np.testing.assert_allclose(alone_, expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(events_of, "PLACES", 75)
    np.testing.assert_allclose(scorer(rows), expected, rtol=0, atol=1e-6)


def test_a_users_history_is_looked_up_once_for_many_candidates(process, tmp_path, monkeypatch):
    make(process, tmp_path, "din", monkeypatch)
    export(process, tmp_path)
    scorer = Scorer.load(tmp_path / "export")
    rows = [row for row in awkward(60, seed=3).to_pylist() if row["items"]][:5]
    user = {name: rows[0][name] for name in ("user", "words", "items", "actions", "ages")}
    candidates = [{name: row[name] for name in ("x", "item")} for row in rows]
    expected = scorer([user | one for one in candidates])
    assert scorer.rank(user, candidates).tolist() == expected.tolist(), "bit for bit"
    events = scorer.prepare_ranked(user, candidates).events[0]
    assert events.count == 5 and len(events.tensors[0]) == int(events.lengths[0]) == len(user["items"][-5:])
    many = [{"x": 0.1 * place, "item": place % 40} for place in range(300)]
    monkeypatch.setattr(events_of, "PLACES", 75)
    assert scorer.rank(user, many).tolist() == scorer([user | one for one in many]).tolist()
    ready = [scorer.prepare_ranked(user, candidates), scorer.prepare_ranked(user, []), scorer.prepare(rows)]
    found = scorer.predict(ready)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[2], scorer(rows), rtol=0, atol=1e-6)
    assert found[1].shape == (0,)
    apart = {name: user[name] for name in ("user", "words", "items")}
    theirs = [one | {"ages": user["ages"], "actions": user["actions"]} for one in candidates]
    with pytest.raises(RowError, match="columns 'actions' and 'ages' and 'items' must be on the same side"):
        scorer.rank(apart, theirs)
    with pytest.raises(RowError, match="row 1: column 'ages' found '1 events', expected 2 as in column 'items'"):
        scorer([user | candidates[0], user | candidates[1] | {"items": [1, 2], "actions": [1, 2], "ages": [0.5]}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [("din", {}), ("din", {"softmax": True}), ("dare", {}), ("dare", {"top_k": 2}), ("hstu", {"form": "research"})],
)
def test_every_graph_answers_as_its_tower(tmp_path, model, changes):
    one = ServedTower(tower_of(model, **changes).float().eval(), amp=False, sequences=FIELDS.sequences)
    program = graph_of(one, 1, 2)
    assert not [node for node in program.graph.nodes if "tessera" in str(node.target)], "operations are torch's alone"
    check_graph(one, tmp_path / "tower.pt2", 1, 2)


@pytest.mark.slow
def test_such_a_model_is_looked_at_before_training_where_it_is_asked_for(process, tmp_path, monkeypatch):
    config = make(process, tmp_path, "hstu", monkeypatch, "export.check=always")
    check_export(load_config([f"--config-dir={tmp_path}"], "") if config is None else config, process)
    with pytest.raises(ConfigError, match="--onnx: the model reads sequence 'h' event by event"):
        export(process, tmp_path, onnx=True)
