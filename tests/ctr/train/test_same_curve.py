"""Models with dropout and batch norm: 1, 2 and 3 ranks have one loss curve, to the last, short batch."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.train.trainer import Trainer
from tests.ranks import on_ranks

BATCH = 32
SCHEMA = (
    "data.schema.features=[{name: x, kind: numeric}, {name: user}, {name: item}, {name: tags, kind: ids}, {name: shop}]"
)
MLP = ["model.hidden=[8,8]", "model.dropout=0.3", "model.batch_norm=true"]
MODELS = {
    "deepfm": ["model=deepfm", *MLP],
    "autoint_plus": ["model=autoint_plus", *MLP, "model.attention_dim=8", "model.attention_dropout=0.4"],
    "final_mlp": ["model=final_mlp", "model.hidden1=[8]", "model.hidden2=[8]", *MLP[1:]],
    "fgcnn": ["model=fgcnn", "model.channels=[3]", "model.kernel=3", "model.conv_batch_norm=true"]
    + ["model.classifier.hidden=[8]", "model.classifier.dropout=0.2"],
    "bfloat16": ["model=dnn", *MLP, "trainer.amp=true"],
    "clipped rows": ["model=dnn", *MLP, "optimizer.sparse.name=sgd", "optimizer.sparse.lr=50"]
    + ["optimizer.sparse.clip_norm=0.001"],
    "bad rows": ["model=dnn", *MLP, "data.bad_rows=skip"],
}
# One row in all, or one on each rank of two, is left for the last batch.
ROWS = {"one row": 5 * BATCH + 1, "two rows": 5 * BATCH + 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        generator = np.random.default_rng(rows)
        ids = {key: generator.integers(0, 30, rows) for key in ("user", "item", "shop")}
        tags = pa.array([list(generator.integers(0, 9, n)) for n in generator.integers(0, 4, rows)])
        x = generator.normal(size=rows).astype(np.float32)
        columns = {"label": generator.integers(0, 2, rows), "x": x, "tags": tags, **ids}
        for kind in (name, f"{name} some bad"):
            (folder / kind / "train").mkdir(parents=True)
            pq.write_table(pa.table(columns), folder / kind / "train" / "part-0.parquet", row_group_size=40)
            x[::17] = np.nan
    return folder


def train(process, data: Path, run_dir: Path, models: list[str], rows: str) -> dict[str, list]:
    """Losses of all steps, and the dense weights at the end, of each model."""
    found = {}
    for name in models:
        kind = f"{rows} some bad" if name == "bad rows" else rows
        fixed = [SCHEMA, f"data.path={data / kind}", "data.valid=null", "data.test=null", "data.schema.time=null"]
        fixed += ["trainer.device=cpu", "embedding.rows=100", "model.embedding_dim=4", f"trainer.batch_size={BATCH}"]
        config = load_config([*fixed, f"trainer.run_dir={run_dir / name}-{process.world_size}", *MODELS[name]], "")
        trainer = Trainer(config, process)
        losses = []
        for batch in trainer.readers["train"].epoch(0):
            losses.append(torch.stack(trainer.engine.train_step(batch)))
        trainer.log.close()
        found[name] = torch.stack(losses), [p.detach() for p in trainer.engine.model.module.dense_parameters().values()]
    return found


def curves(world: int, *arguments) -> dict[str, tuple]:
    results = on_ranks(world, train, *arguments)
    return {name: (sum(one[name][0] for one in results), results[0][name][1]) for name in results[0]}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    cached = {}

    def run(world: int, rows: str):
        if (world, rows) not in cached:
            models = list(MODELS) if rows == "one row" else ["deepfm"]
            cached[world, rows] = curves(world, data, tmp_path_factory.mktemp("runs"), models, rows)
        return cached[world, rows]

    return run


@pytest.mark.parametrize(
    ("world", "rows"),
    [*(pytest.param(world, "one row", marks=pytest.mark.slow) for world in (2, 3)), (2, "two rows")],
)
def test_ranks_have_one_loss_curve(trained, world, rows):
    for name, (losses, weights) in trained(world, rows).items():
        expected_losses, expected_weights = trained(1, rows)[name]
        assert len(losses) == 6 and losses[-1, 1] == (1 if rows == "one row" else 2) or name == "bad rows"
        close = partial(torch.testing.assert_close, msg=lambda text, name=name: f"{name}: {text}")
        if name == "bfloat16":  # sums round by their order to 1/256, of which Adam's first steps may take the sign
            close(losses[:2], expected_losses[:2], rtol=0.01, atol=0)
            continue
        close(losses, expected_losses, rtol=2e-5, atol=2e-5)
        close(weights, expected_weights, rtol=1e-3, atol=1e-5)


def test_the_same_run_again_has_the_same_bits(trained, data, tmp_path):
    again = curves(1, data, tmp_path, ["deepfm"], "one row")["deepfm"]
    assert torch.equal(again[0], trained(1, "one row")["deepfm"][0])
