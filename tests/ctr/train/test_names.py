"""Columns, features and tables of any name: trained, saved and loaded, or one line at start."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.tables import LONGEST_NAME
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.module_names import module_name
from tessera.distributed.saved.row_files import folder_name
from tessera.distributed.tables import owned_tables
from tessera.embedding.errors import TesseraError
from tests.ranks import on_ranks

NAMES = [
    "type",
    "keys",
    "train",
    "forward",
    "a.b",
    "a/b",
    "weight",
    "modules",
    "a@b",
    "%",
    ".",
    "..",
    "",
    " ",
    "é",
    "x" * 255,
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("names"), np.random.default_rng(0)
    (folder / "train").mkdir()
    columns = {name: generator.integers(0, 9, 40) for name in [*NAMES, "y" * 256]}
    columns |= {f"number {name}": generator.normal(size=40) for name in NAMES} | {"label": generator.integers(0, 2, 40)}
    pq.write_table(pa.table(columns), folder / "train" / "part-0.parquet")
    return folder


def settings(data: Path, features: list[dict], *more: str) -> list[str]:
    fixed = [f"data.path={data}", "data.valid=null", "data.test=null", "data.schema.time=null", "model.hidden=[4]"]
    fixed += ["trainer.batch_size=20", "embedding.rows=50", "model.embedding_dim=4"]
    pairs = [[f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in one.items()] for one in features]
    schema = ", ".join(f"{{{', '.join(one)}}}" for one in pairs)
    return [f"data.schema.features=[{schema}]", *fixed, *more]


def train_and_resume(process, data: Path, run_dir: Path) -> list[bool]:
    """By kind of table: whether a state that was saved after an epoch gives the same rows and dense weights back."""
    same = []
    for kind, names in (("dynamic", NAMES), ("static", ["keys", "a.b", "a/b", "", "é"])):  # names of modules are common
        features = [{"name": name} for name in names]
        features += [{"name": f"number {name}", "kind": "numeric"} for name in names]
        config = load_config(settings(data, features, f"embedding={kind}", f"trainer.run_dir={run_dir / kind}"), "")
        trainers = []
        for resume in (None, "auto"):
            config.trainer.resume = resume
            trainers.append(Trainer(config, process))
            if resume is None:
                for batch in trainers[0].readers["train"].epoch(0):
                    trainers[0].engine.train_step(batch)
                trainers[0].checkpoints.save()
            trainers[-1].checkpoints.close()
            trainers[-1].log.close()
        same.append(trainers[1].engine.step == 2 and content(trainers[0]) == content(trainers[1]))
    return same


def content(trainer: Trainer) -> dict:
    found = {name: p.tolist() for name, p in trainer.engine.model.module.dense_parameters().items()}
    for name, table in owned_tables(trainer.engine.tables).items():
        for batch in table.export_rows():
            found |= {(name, i): row.tolist() for i, row in zip(batch.ids.tolist(), batch.values, strict=True)}
    for name, value in trainer.engine.tables.tensors().items():
        found[name] = [shard.tensor.tolist() for shard in value.local_shards()]
    return found


def test_features_of_any_name_are_trained_saved_and_loaded(data, tmp_path):
    assert on_ranks(2, train_and_resume, data, tmp_path) == [[True, True]] * 2


def test_names_of_modules_and_folders_are_valid_and_differ():
    module = torch.nn.ModuleDict({module_name(name): torch.nn.Identity() for name in NAMES})
    assert len(module) == len(NAMES) == len({folder_name(name) for name in NAMES})
    assert all("/" not in name and name.strip(".") for name in map(folder_name, NAMES))
    assert module_name("user_id") == "t_user_id" and folder_name("user_id") == "user_id"  # readable


TOO_LONG = [{"name": "y" * 256}, {"name": "type", "table": "é" * 50}, {"name": "type", "table": "/" * 86}]


def refused(process, data: Path, run_dir: Path) -> list[str]:
    messages = []
    for feature in TOO_LONG:
        with pytest.raises(TesseraError) as error:
            Trainer(load_config(settings(data, [{"name": "keys"}, feature], f"trainer.run_dir={run_dir}"), ""), process)
        messages.append(str(error.value))
    return messages


def test_a_name_too_long_for_a_folder_is_found_at_start(data, tmp_path):
    (messages,) = on_ranks(1, refused, data, tmp_path / "run")
    for feature, message in zip(TOO_LONG, messages, strict=True):
        assert f"the table of {feature['name']!r} is saved in a folder of its name" in message
        assert f"expected at most {LONGEST_NAME}" in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_the_column_of_a_feature_keeps_its_long_name(data, tmp_path):
    config = load_config(settings(data, [{"name": "short", "column": "y" * 256}]), "")
    assert config.data.schema.features[0].column == "y" * 256
