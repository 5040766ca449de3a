"""Training on sequences: rows of events are trained, kept, saved and removed as those of pooled ids are."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr import api
from tessera.ctr.config import load_config
from tessera.ctr.models.layers import MLP, FieldEmbedding
from tessera.ctr.models.sequences import mean_of_events
from tessera.ctr.models.tower import SequenceTower
from tessera.ctr.train.trainer import Trainer
from tessera.embedding.errors import ConfigError
from tests.ctr.train.states import assert_same_end, metrics_of, newest, rows_of_state
from tests.ctr.train.test_resume import trained as run
from tests.ranks import on_ranks

ROWS, BATCH, DAY, NOW = 321, 32, 86_400, 20_454 * 86_400
SEQUENCE = "kind: sequence, pooling: POOLING, align: h, max_length: 5"
FEATURES = (
    "data.schema.features=[{name: x, kind: numeric}, {name: user}, {name: item}, {name: shop}, "
    f"{{name: seen, table: item, {SEQUENCE}}}, {{name: shops, table: shop, {SEQUENCE}}}, "
    f"{{name: age, dtype: float, transform: bucketise, boundaries: [10, 20], {SEQUENCE}}}"
)
PRICE = f", {{name: price, dtype: float, {SEQUENCE}}}"
MODELS = {
    "din": ["model=din", "model.hidden=[8]", "model.attention_hidden=[4]", "model.dropout=0.3"],
    "dien": ["model=dien", "model.hidden=[8]", "model.attention_hidden=[4]", "model.auxiliary_hidden=[4]"]
    + ["model.negatives={seen: shops}", "model.dropout=0.3"],
    "bst": [
        "model=bst",
        "model.width=4",
        "model.heads=2",
        "model.feed_forward=6",
        "model.hidden=[8]",
        "model.dropout=0.2",
    ],
    "dare": ["model=dare", "model.hidden=[8]", "model.attention_dim=3", "model.top_k=3", "model.batch_norm=true"],
    "hstu": ["model=hstu", "model.width=8", "model.heads=2", "model.qk_dim=3", "model.v_dim=3", "model.preprocessor=4"]
    + ["model.head_hidden=4", "model.input_dropout=0.2", "model.dropout=0.1"],
}


class Averages(SequenceTower):
    """What a model of pooled fields does, with sequences averaged by the tower."""

    def __init__(self, fields, embedding_dim, hidden, dropout, *, batch_norm):
        super().__init__()
        self.embedding_dims = {"v": embedding_dim, "w": 1}
        self.embed = FieldEmbedding(fields, embedding_dim)
        vectors = self.embed.count + sum(len(group.ids) for group in fields.sequences)
        self.mlp = MLP(vectors * embedding_dim, [6], outputs=1)
        self.of_w = MLP(len(fields.ids) + sum(len(group.ids) for group in fields.sequences), [3], outputs=1)

    def forward(self, numeric_bn, embeddings, events):
        emb = embeddings["v"]
        means = {group: [embeddings[group].flatten(1)] for group in ("v", "w")}
        for one in events.values():
            for group, found in means.items():
                found += [mean_of_events(rows, one.offsets) for rows in one.embeddings[group].values()]
        numeric = self.embed(numeric_bn, emb)[:, : -emb.shape[1]].flatten(1)
        return (self.mlp(torch.cat([numeric, *means["v"]], 1)) + self.of_w(torch.cat(means["w"], 1))).squeeze(1)


class Pooled(Averages):
    reads_sequences = False

    def forward(self, numeric_bn, embeddings):
        return super().forward(numeric_bn, embeddings, {})


def write(folder: Path, rows: int = ROWS, seed: int = 1) -> Path:
    """Items 1000 and on occur in histories alone, of the first day's rows."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(0, 8, rows)
    day = np.sort(draw.integers(0, 5, rows))

    def lists(low, high, type_):
        return pa.array([list(draw.integers(low, high, n)) for n in sizes], type_)

    of_day = [(1000, 1020) if one == 0 else (0, 30) for one in day]
    seen = [list(draw.integers(*of, n)) for n, of in zip(sizes, of_day, strict=True)]
    table = {
        "label": draw.integers(0, 2, rows).astype(np.int8),
        "time": NOW + day * DAY,
        "x": draw.normal(size=rows).astype(np.float32),
        **{name: draw.integers(0, 30, rows) for name in ("user", "item", "shop")},
        "seen": pa.array(seen, pa.list_(pa.int64())),
        "shops": lists(0, 30, pa.list_(pa.int64())),
        "age": lists(0, 30, pa.list_(pa.int64())),
        "price": lists(0, 3, pa.list_(pa.float32())),
    }
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table(table), folder / split / "part-0.parquet", row_group_size=40, write_page_checksum=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("sequences"))


def arguments(data: Path, run_dir: Path, *more: str, pooling: str = "none") -> list[str]:
    features = FEATURES + PRICE + "]" if pooling == "none" else (FEATURES + "]").replace(", align: h", "")
    fixed = [features.replace("POOLING", pooling), f"data.path={data}", "data.test=null", "data.schema.time=time"]
    small = ["trainer.device=cpu", "trainer.threads=1", "embedding.rows=100", "model.embedding_dim=4"]
    return [*fixed, *small, f"trainer.run_dir={run_dir}", f"trainer.batch_size={BATCH}", *more]


def config_of(data: Path, run_dir: Path, *more: str, pooling: str = "none"):
    return load_config(arguments(data, run_dir, *more, pooling=pooling), "")


def trained(process, data: Path, run_dir: Path, *more: str, pooling: str = "none", epochs: int = 1):
    """Losses, the dense weights, and (table, id) -> bits of the rows of this rank."""
    trainer = Trainer(config_of(data, run_dir, *more, pooling=pooling), process)
    losses = []
    for epoch in range(epochs):
        for batch in trainer.readers["train"].epoch(epoch):
            losses.append(torch.stack(trainer.engine.train_step(batch)))
    trainer.log.close()
    rows = {
        (name, int(one)): torch.cat([values, state])
        for name, table in trainer.engine.tables.owned().items()
        for found in table.export_rows()
        for one, values, state in zip(found.ids, found.values, found.state, strict=True)
    }
    return torch.stack(losses), trainer.engine.model.module.dense_parameters(), rows


@pytest.mark.parametrize("more", [[], ["embedding.oov=learned", "embedding.admission.kind=exact", "embedding.l2=0.01"]])
def test_a_tower_that_averages_its_events_is_one_of_pooled_features_bit_for_bit(process, data, tmp_path, more):
    threshold = ["embedding.admission.threshold=2"] if more else []
    setting = [*more, *threshold, "optimizer.sparse.name=adam"]
    here = "model.target=tests.ctr.train.test_sequences.NAME"
    of_events = trained(process, data, tmp_path / "a", here.replace("NAME", "Averages"), *setting, epochs=2)
    torch.manual_seed(0)
    pooled = trained(process, data, tmp_path / "b", here.replace("NAME", "Pooled"), *setting, pooling="mean", epochs=2)
    assert torch.equal(of_events[0], pooled[0])
    for name, weight in of_events[1].items():
        assert torch.equal(weight, pooled[1][name]), name
    assert of_events[2].keys() == pooled[2].keys() and ("item", 1005) in pooled[2]
    assert all(torch.equal(row, pooled[2][key]) for key, row in of_events[2].items())


def train_all(process, data: Path, run_dir: Path, models: list[str]):
    found = {}
    for name in models:
        more = [*MODELS[name], "optimizer.sparse.name=sgd"]
        losses, dense, rows = trained(process, data, run_dir / f"{name}-{process.world_size}", *more)
        found[name] = losses, [one.detach() for one in dense.values()], rows
    return found


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_agree_on_sequences(process, data, tmp_path, world):
    results = on_ranks(world, train_all, data, tmp_path, list(MODELS))
    for name, (losses, weights, rows) in train_all(process, data, tmp_path, list(MODELS)).items():
        torch.testing.assert_close(sum(one[name][0] for one in results), losses, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(results[0][name][1], weights, rtol=1e-3, atol=2e-5)
        of_ranks = {key: row for one in results for key, row in one[name][2].items()}
        assert of_ranks.keys() == rows.keys()
        for key, row in rows.items():
            torch.testing.assert_close(of_ranks[key], row, rtol=1e-3, atol=2e-5)


def test_rows_that_only_events_have_are_saved_and_expire(process, data, tmp_path):
    """Deltas hold them as any row; they expire by the time of the row whose history they were in."""
    more = ["data.order=time", "embedding.ttl_days=2", "embedding.expire_every=1", "trainer.checkpoint.every=4"]
    more += ["trainer.checkpoint.full_every=3", "trainer.checkpoint.overlap=false", "trainer.epochs=1"]
    trainer = Trainer(config_of(data, tmp_path, *MODELS["din"], *more), process)
    alone = set(range(1000, 1020))
    table = trainer.engine.tables.owned()["item"]

    def ids():
        return {int(one) for rows in table.export_rows() for one in rows.ids} & alone

    found = []
    for batch in trainer.readers.train_batches(trainer.engine, trainer.log):
        trainer.engine.train_step(batch)
        trainer.engine.expire_if_due()
        found.append(len(ids()))
    trainer.log.close()
    assert max(found) == 20 and found[-1] == 0


def write_days_of_events(folder: Path, days: int = 4, rows: int = 60) -> Path:
    """Ten items are targets; each day has 20 items of its own, which occur in histories alone and never again."""
    draw, count = np.random.default_rng(5), days * rows
    day, sizes = np.repeat(np.arange(days), rows), draw.integers(0, 8, count)

    def lists(high, type_):
        return pa.array([list(draw.integers(0, high, n)) for n in sizes], pa.list_(type_))

    seen = [list(1000 + 20 * one + draw.integers(0, 20, n)) for one, n in zip(day, sizes, strict=True)]
    table = {
        "label": draw.integers(0, 2, count).astype(np.int8),
        "time": NOW + day * DAY,
        "x": draw.normal(size=count).astype(np.float32),
        **{name: draw.integers(0, 10, count) for name in ("user", "item", "shop")},
        "seen": pa.array(seen, pa.list_(pa.int64())),
        **{name: lists(10, pa.int64()) for name in ("shops", "age")},
        "price": lists(3, pa.float32()),
    }
    (folder / "train").mkdir(parents=True)
    pq.write_table(pa.table(table), folder / "train" / "part-0.parquet", row_group_size=20, write_page_checksum=True)
    return folder


def test_rows_that_only_events_have_are_evicted_by_size(process, tmp_path):
    """A table that holds the events of two days loses the oldest first. Nobody asks for those again: all else, and what
    is saved in deltas, is as without a limit, bit for bit."""
    data = write_days_of_events(tmp_path / "data")
    more = ["data.order=time", "data.valid=null", "data.lanes=1", "trainer.batch_size=8", "trainer.epochs=1"]
    more += ["trainer.checkpoint.every=7", "trainer.checkpoint.full_every=9"]
    limit = ["embedding.tables.item.max_rows=50", "embedding.tables.item.eviction=lru"]
    losses, states = {}, {}
    for name, setting in (("all", []), ("some", limit)):
        trainer = Trainer(config_of(data, tmp_path / name, *MODELS["din"], *more, *setting), process)
        losses[name] = []
        for batch in trainer.readers.train_batches(trainer.engine, trainer.log):
            losses[name].append(float(trainer.engine.train_step(batch)[0]))
            trainer.checkpoints.after_step()
        trainer.checkpoints.save()
        trainer.checkpoints.close()
        trainer.log.close()
        states[name] = newest(tmp_path / name)
    assert len(json.loads((states["some"] / "manifest.json").read_text())["chain"]) == 4, "a whole state, then deltas"
    whole, kept = (rows_of_state(state, numbers=False) for state in states.values())
    assert kept["item"].keys() <= whole["item"].keys() and len(whole["item"]) == 90 and len(kept["item"]) == 50
    assert kept["item"].keys() >= {*range(10), *range(1060, 1080)} and not kept["item"].keys() & {*range(1000, 1040)}
    for name, rows in kept.items():
        assert name == "item" or rows.keys() == whole[name].keys()
        assert all(row == whole[name][one] for one, row in rows.items()), name
    assert losses["all"] == losses["some"] and len(losses["all"]) == 32


def job(data: Path, run_dir: Path) -> list[str]:
    """Two epochs of 11 steps of HSTU with dropout; states are deltas but for each third."""
    states = [
        "trainer.checkpoint.every=3",
        "trainer.checkpoint.full_every=3",
        "trainer.resume=auto",
        "trainer.epochs=2",
    ]
    return arguments(data, run_dir, *MODELS["hstu"], *states, "optimizer.sparse.name=sgd", "trainer.log_every=1")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_ranks(ranks, data, tmp_path):
    run(ranks, 1, job(data, tmp_path / "whole"), tmp_path)
    command = job(data, tmp_path / "parts")
    run(ranks, 1, command, tmp_path, -signal.SIGKILL, (8, signal.SIGKILL, [0]))
    assert "goes on from" in run(ranks, 2, command, tmp_path)
    found, expected = (rows_of_state(newest(tmp_path / name), numbers=False) for name in ("parts", "whole"))
    assert found.keys() == expected.keys() and set(range(1000, 1020)) <= found["item"].keys()
    for name, rows in expected.items():
        assert {one: row["count"] for one, row in found[name].items()} == {
            one: row["count"] for one, row in rows.items()
        }
    mine, other = (metrics_of(tmp_path / name) for name in ("parts", "whole"))
    losses = [[line["loss"] for line in lines if line["kind"] == "train"] for lines in (mine, other)]
    assert len(losses[0]) == 22 and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not_bit_for_bit(ranks, data, tmp_path):
    run(ranks, 2, job(data, tmp_path / "whole"), tmp_path)
    command = job(data, tmp_path / "parts")
    run(ranks, 2, command, tmp_path, -signal.SIGKILL, (8, signal.SIGKILL, [0, 1]))
    run(ranks, 2, command, tmp_path)
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def test_scores_of_new_rows_are_those_of_the_report(data, tmp_path):
    """Scoring looks rows up as evaluation does, in batches of other sizes, with and without rows of each rank."""
    trained_config = api.load_config(*arguments(data, tmp_path / "run", *MODELS["dare"]))
    trained_config.data.test = "valid"
    done = api.train(trained_config)
    table = pq.read_table(data / "valid" / "part-0.parquet")
    scored = api.score(done, table)
    expected = done.predictions("test").column("prediction").to_numpy()
    np.testing.assert_allclose(np.sort(scored.column("prediction").to_numpy()), np.sort(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["model=deepfm"], r"DeepFM, which reads no sequence event by event \(feature 'seen' has pooling: none\)"),
        (["model=din", "embedding=static"], "embedding.kind is static, and the rows of feature 'seen' reach the tower"),
        (["model=din", "embedding.pooled_output_dist=always"], "pooled_output_dist is always for table 'item'"),
        (["model=din", "trainer.compile=true"], "trainer.compile is true, and .*DIN sees events, whose number differs"),
        (["model=din", "embedding.tables.item.dim=2"], "embedding.tables.item.dim is below the tower's"),
    ],
)
def test_what_cannot_serve_events_is_refused(process, data, tmp_path, more, line):
    with pytest.raises(ConfigError, match=line):
        Trainer(config_of(data, tmp_path, *more), process)
