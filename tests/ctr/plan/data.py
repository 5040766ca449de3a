"""A small data set with several tables, bags and weights, and statistics of some of its batches."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.plan.statistics import Statistics, from_batches
from tessera.ctr.train.evaluate import read_split
from tessera.distributed.rank import Process

ROWS, BATCH = 9600, 960
FEATURES = (
    "data.schema.features=[{name: x, kind: numeric}, {name: user}, {name: item}, {name: shop}, "
    "{name: seen, kind: sequence, table: item}, {name: tags, kind: ids, weights: tag_weights, max_length: 4}]"
)


def write(folder: Path) -> list[str]:
    """Write the training rows and return the configuration of a job on them."""
    draw = np.random.default_rng(5)
    (folder / "train").mkdir(parents=True)

    def bags(longest: int) -> tuple[pa.Array, int]:
        ends = np.concatenate([[0], np.cumsum(draw.integers(0, longest + 1, ROWS))]).astype(np.int32)
        return pa.array(ends), int(ends[-1])

    seen, seen_ids = bags(6)
    tags, tag_ids = bags(6)
    table = {
        "label": draw.integers(0, 2, ROWS),
        "x": draw.random(ROWS).astype(np.float32),
        "time": 1_700_000_000 + np.arange(ROWS),
        "user": draw.integers(0, 50_000, ROWS),
        "item": draw.zipf(1.2, ROWS).clip(max=10**6),
        "shop": draw.zipf(1.1, ROWS).clip(max=3000),
        "seen": pa.ListArray.from_arrays(seen, pa.array(draw.zipf(1.2, seen_ids).clip(max=10**6))),
        "tags": pa.ListArray.from_arrays(tags, pa.array(draw.integers(0, 700, tag_ids))),
        "tag_weights": pa.ListArray.from_arrays(tags, pa.array(draw.random(tag_ids).astype(np.float32))),
    }
    pq.write_table(pa.table(table), folder / "train/part.parquet", row_group_size=ROWS // 40)
    fixed = "data.schema.time=time data.valid=null data.test=null"
    trainer = f"trainer.device=cpu trainer.threads=1 trainer.batch_size={BATCH} data.lanes=12 data.window_rows=64"
    words = f"data=synthetic {fixed} {trainer}".split()
    return [*words, FEATURES, f"data.path={folder}", f"trainer.run_dir={folder}/run"]


def statistics_of(arguments: list[str], first: int = 0, batches: int = 4) -> Statistics:
    """Return the statistics of batches `first`, `first` + 1, ... of a job."""
    config = load_config(arguments, "")
    schema = Schema(config.data.schema)
    reader = read_split(config, schema, Process(0, 0, 1, torch.device("cpu"), dist.HashStore()), "train")
    assert reader is not None
    return from_batches(list(islice(reader.epoch(0), first, first + batches)), schema, reader.rows)
