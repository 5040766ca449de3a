"""A small data set with a funnel: clicks that follow from one id, purchases after clicks that follow from another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = (
    "data.schema={labels: [click, {name: buy, where: click}], time: null, group: user, "
    "features: [{name: user}, {name: item}, {name: x, kind: numeric}]}"
)


def funnel_table(rows: int, seed: int, **changes) -> pa.Table:
    random = np.random.default_rng(seed)
    user, item, x = random.integers(0, 20, rows), random.integers(0, 15, rows), random.normal(size=rows)
    click = random.random(rows) < 1 / (1 + np.exp(-(user % 5 - 2.0 + x / 2)))
    buy = click & (random.random(rows) < 1 / (1 + np.exp(-(item % 4 - 2.0))))
    columns = {"click": click.astype(np.int8), "buy": buy.astype(np.int8), "user": user, "item": item, "x": x}
    return pa.table(columns | changes)


def write_funnel(folder: Path, rows: int = 1200) -> Path:
    for seed, split in enumerate(("train", "valid", "test")):
        (folder / split).mkdir(parents=True)
        pq.write_table(funnel_table(rows if not seed else rows // 3, seed), folder / split / "part-0.parquet")
    return folder


def options(data: Path, run_dir: Path, model: str = "mmoe", *more: str) -> list[str]:
    small = {"mmoe": ["expert=[8]", "gate=[]", "head=[4]", "experts=2"], "ple": []}.get(model, ["hidden=[8]"])
    return [
        *("data=movielens", "data.name=funnel", f"data.path={data}", SCHEMA, f"trainer.run_dir={run_dir}"),
        *(f"model={model}", "model.embedding_dim=4", *(f"model.{one}" for one in small)),
        *("data.train=train", "data.valid=valid", "data.test=test"),
        *(
            "embedding.rows=500",
            "optimizer.sparse.name=rowwise_adagrad",
            "optimizer.sparse.lr=0.05",
            "optimizer.dense.lr=0.01",
            "trainer.batch_size=120",
        ),
        *("trainer.log_every=5", "trainer.device=cpu", "trainer.threads=1", *more),
    ]
