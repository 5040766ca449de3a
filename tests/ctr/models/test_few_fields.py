"""Models of few fields, or of one kind alone: they train, or one line says what they need."""

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.models.tower import Tower
from tessera.ctr.network import build_tower
from tessera.ctr.train.evaluate import evaluate
from tessera.ctr.train.trainer import Trainer
from tessera.embedding.errors import ConfigError, TesseraError
from tests.ctr.models.names import OF_ONE_LABEL as MODELS
from tests.ctr.models.names import quick
from tests.ranks import on_ranks

CROSSES_NOTHING = ("dnn", "final_mlp", "final_net", "lr", "mask_net", "wide_deep")
NUMERIC = [f"{{name: x{i}, kind: numeric}}" for i in range(3)]
IDS = [f"{{name: c{i}}}" for i in range(3)]
FIELDS = {"numeric alone": NUMERIC, "ids alone": IDS, "one number": NUMERIC[:1], "one id": IDS[:1]}
WIDTHS = ["model.embedding_dim=4", "model.hidden=[8]", "model.hidden1=[8]", "model.hidden2=[8]", "model.kernel=1"]
WIDTHS += [
    "model.attention_dim=8",
    "model.channels=[2]",
    "model.maps=[4]",
    "model.classifier.hidden=[8]",
    "model.bottom=[8]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("few"), np.random.default_rng(0)
    columns = {f"x{i}": generator.normal(size=97).astype(np.float32) for i in range(3)}
    columns |= {f"c{i}": generator.integers(0, 20, 97) for i in range(3)} | {"label": generator.integers(0, 2, 97)}
    for split in ("train", "valid"):
        (folder / split).mkdir()
        pq.write_table(pa.table(columns), folder / split / "part-0.parquet")
    return folder


@cache
def keys_of(model: str) -> set[str]:
    return set(load_config([f"model={model}"], "").model)


def settings(model: str, features: list[str], *more: str) -> list[str]:
    keys = keys_of(model)
    widths = [
        one
        for one in WIDTHS
        if one.split("=")[0].split(".")[1] in keys and not (model in ("kpnn", "fmfm") and "kernel" in one)
    ]
    schema = f"data.schema.features=[{', '.join(features)}]"
    return [f"model={model}", *widths, schema, "data.schema.time=null", *more]


def train(process, data: Path, run_dir: Path, which: str) -> dict[str, list | str]:
    """By model and kind of table: losses of two steps and of an evaluation, or the line that refuses it."""
    found = {}
    for model in MODELS:
        for kind in ("dynamic", "static") if model in ("deepfm", "lr") else ("dynamic",):
            fixed = [f"data.path={data}", "data.test=null", f"embedding={kind}", "embedding.rows=50"]
            fixed += ["trainer.batch_size=50", f"trainer.run_dir={run_dir / model}-{kind}-{process.world_size}"]
            try:
                trainer = Trainer(load_config([*settings(model, FIELDS[which], *fixed)], ""), process)
            except TesseraError as error:
                found[model, kind] = str(error)
                continue
            losses = [
                torch.stack(trainer.engine.train_step(batch)).tolist() for batch in trainer.readers["train"].epoch(0)
            ]
            trainer.checkpoints.save()
            metrics = evaluate(trainer.engine.model, trainer.readers["valid"], process)
            trainer.checkpoints.close()
            trainer.log.close()
            found[model, kind] = [*losses, metrics["logloss"]]
    return found


@pytest.mark.slow  # test_towers.py has fields of all kinds
@pytest.mark.parametrize("which", FIELDS)
def test_every_model_trains_or_says_what_it_needs(data, tmp_path, which):
    for (model, kind), result in on_ranks(1, train, data, tmp_path, which)[0].items():
        if which.startswith("one") and model not in CROSSES_NOTHING:
            assert "crosses fields" in result and "\n" not in result, (model, kind)
        else:
            # AFN's norms of logarithms have seen two steps when they are evaluated.
            bound = 4 if model.startswith("afn") else 2
            assert len(result) == 3 and result[-1] < bound, (model, kind, result)


@pytest.mark.slow
def test_numeric_features_alone_on_1_and_2_ranks(data, tmp_path):
    one, two = (on_ranks(world, train, data, tmp_path, "numeric alone") for world in (1, 2))
    for name, (*losses, logloss) in one[0].items():
        both = torch.tensor([results[name][:-1] for results in two]).sum(0)
        torch.testing.assert_close(both, torch.tensor(losses), rtol=1e-4, atol=1e-4, msg=str(name))
        assert two[0][name][-1] == pytest.approx(logloss, rel=1e-4)


class ReadsVectorsAlone(Tower):
    def __init__(self, fields, embedding_dim: int):
        super().__init__()
        self.embedding_dims = {"v": embedding_dim}
        self.output = nn.Linear(embedding_dim, 1)

    def forward(self, numeric_bn, embeddings):
        return self.output(embeddings["v"].sum(1)).squeeze(1)


@pytest.mark.parametrize("numeric", [1, 3])
def test_raw_numbers_that_no_layer_reads_are_one_line(numeric):
    config = load_config(settings("dnn", NUMERIC[:numeric] + IDS, "numeric=raw"), "")
    config.model = {"target": "tests.ctr.models.test_few_fields.ReadsVectorsAlone", "embedding_dim": 4}
    with pytest.raises(
        ConfigError, match="numeric.target is tessera.ctr.models.numeric.Raw, but .* never reads numbers"
    ):
        build_tower(config, Schema(config.data.schema))


@pytest.mark.parametrize("model", quick(MODELS))
def test_every_model_of_ours_reads_raw_numbers(model):
    config = load_config(settings(model, NUMERIC + IDS, "numeric=raw"), "")
    assert build_tower(config, Schema(config.data.schema)).training
