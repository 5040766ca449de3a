"""Small models with rows in their tables, saved as a run's best, and awkward rows for them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.config import schema_of
from tessera.ctr.export.export import Exported, Options, export_model
from tessera.ctr.export.source import source_of_run
from tessera.ctr.network import build_model
from tessera.ctr.runs.saved_model import save_model
from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.score_rows import row_reader
from tessera.distributed.rank import Process
from tessera.distributed.tables import as_dynamic
from tests.ctr.models.names import HIDDEN

FEATURES = (
    "data.schema.features=["
    "{name: x, kind: numeric}, {name: y, kind: numeric, transform: log1p, missing: -1, indicator: true}, "
    "{name: z, kind: numeric, column: y, transform: bucketise, boundaries: [0, 2, 9], "
    "missing_id: 18446744073709551615}, {name: c, missing_id: -5}, {name: d}, {name: e, table: c}, "
    "{name: s, dtype: string}, {name: h, dtype: hex}, "
    "{name: tags, kind: ids, weights: tag_weights, pooling: mean, max_length: 3}, "
    "{name: words, kind: ids, dtype: string}, "
    "{name: last, kind: sequence, delimiter: '|', pooling: sum, max_length: 2, table: d}, "
    "{name: ratio, kind: numeric, expr: 'x / (y * y + 1)', missing: 2}, {name: band, expr: 'integer(x * 3)'}, "
    "{name: c_s, kind: cross, of: [c, s]}, {name: e_words, kind: cross, of: [e, words], max_length: 3, table: pairs}, "
    "{name: v, kind: vector, length: 3, indicator: true, transform: standardise, mean: 0.5, std: 2, missing: -0.25}, "
    "{name: last_z, kind: cross, of: [last, z], max_length: 4, pooling: sum, table: pairs}]"
)
USER = {"gnolr": ["model.user=[x, s, h]"]}  # models that are told which fields are the user's


def awkward_rows(count: int, seed: int = 0) -> pa.Table:
    """Rows with nulls, negative and unsigned ids, unknown ids, empty bags and items without a value."""
    draw = np.random.default_rng(seed)

    def some(values: list) -> list:
        return [None if draw.random() < 0.15 else value for value in values]

    lengths = draw.integers(0, 5, count)
    tags = [None if draw.random() < 0.1 else draw.integers(-9, 9, n).tolist() for n in lengths]
    weights = [None if one is None else draw.normal(size=len(one)).tolist() for one in tags]
    return pa.table(
        {
            "label": pa.array(draw.integers(0, 2, count)),
            "buy": pa.array(draw.integers(0, 2, count)),
            "price": pa.array(draw.normal(size=count)),
            "x": pa.array(draw.normal(size=count)),
            "y": pa.array(some((draw.normal(size=count) * 20).tolist()), pa.float32()),
            "c": pa.array(some(draw.integers(-30, 30, count).tolist()), pa.int32()),
            "d": pa.array(some([int(v) + 2**63 for v in draw.integers(0, 20, count)]), pa.uint64()),
            "e": pa.array(draw.integers(-40, 40, count)),
            "s": pa.array(some([f"s{v}ä" for v in draw.integers(0, 30, count)])),
            "h": pa.array([("" if v == 3 else f"{v:x}") for v in draw.integers(0, 30, count)]),
            "tags": pa.array(tags, pa.list_(pa.int64())),
            "tag_weights": pa.array(weights, pa.list_(pa.float32())),
            "words": pa.array([[f"w{i}" for i in draw.integers(0, 9, n)] for n in lengths], pa.list_(pa.string())),
            "v": pa.array(some(draw.normal(size=(count, 3)).tolist()), pa.list_(pa.float32())),
            "last": pa.array(some(["|".join(map(str, draw.integers(0, 9, n))) for n in lengths])),
        }
    )


def overrides_of(folder: Path, *more: str, model: str = "deepfm") -> list[str]:
    small = [f"model.{key}=[8]" for key in HIDDEN.get(model, ["hidden"])]
    small += USER.get(model, [])
    if model != "lr":
        small.append("model.embedding_dim=4")
    return [
        *("data=synthetic", FEATURES, "data.schema.time=null", f"model={model}", *small, f"data.path={folder}/data"),
        *("embedding.init_std=0.4", "embedding.rows=400", "trainer.device=cpu", "trainer.threads=1"),
        *("data.lanes=4", "data.window_rows=64", "trainer.batch_size=60", *more),
    ]


def make_run(process: Process, folder: Path, overrides: list[str]) -> Config:
    """Save a model whose tables have the ids of 120 rows as the best of a run; its weights are random."""
    config = load_config([*overrides, f"trainer.run_dir={folder}/run"], "")
    if process.is_main:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "run").mkdir(exist_ok=True)
        pq.write_table(awkward_rows(120), folder / "data" / "valid.parquet")
        (folder / "run" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
    torch.distributed.barrier()
    model, _ = build_model(config, schema_of(config.data), process)
    touch(process, config, model, folder / "data" / "valid.parquet")
    save_model(model, folder / "run" / "best", process, step=7)
    return config


def touch(process: Process, config: Config, model, path: Path, seed: int = 0, now: int = 1) -> None:
    """Give the ids of a file rows, seen at `now` (seconds), and all dense weights other values."""
    config.trainer.batch_size //= process.world_size
    model.train()
    dynamic = as_dynamic(model.module.tables)
    for batch in row_reader(config, [str(path)]).epoch(0):
        if dynamic:
            dynamic.begin_step(now)
        batch.place = torch.arange(batch.numeric.shape[0])
        model(batch)
    config.trainer.batch_size *= process.world_size
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*model.module.dense_parameters().values(), *model.module.tower.buffers()]:
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=draw) * 0.5)


def export(process: Process, folder: Path, name: str = "export", **options) -> Exported:
    config = run_config(folder / "run", [])
    source = source_of_run(config, folder / "run", process)
    return export_model(config, process, source, folder / name, [folder / "run"], Options(**options))


@contextmanager
def damaged(path: Path, content: bytes | None):
    """Have a file hold something else for a while; None: not be there."""
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    yield
    path.write_bytes(whole)
