"""Six small jobs that cover much of the code, and what is measured of each: losses, metrics, counts of rows, bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.ctr.daily.days import command, key_of, write_days
from tests.ctr.train.states import arguments, metrics_of, newest, rows_of_state, tensors_of_state, write_data
from tests.ctr.train.warm_ranks import WarmRanks

FOLDER = Path(__file__).parent
ROWS, BATCH, DAYS = 1000, 64, 6
BAGS = (
    "data.schema.features=["
    "{name: x, kind: numeric}, {name: y, kind: numeric, transform: log1p, missing: -1, indicator: true}, {name: c}, "
    "{name: d}, {name: e, table: c}, {name: tags, kind: ids, weights: tag_weights, pooling: sum, max_length: 3}]"
)
#: Keys of a line of metrics.jsonl that are compared, of the kinds that are results.
RESULTS = {
    "eval": ("split", "step", "model", "auc", "logloss", "gauc", "calibration"),
    "distil": ("step", "epoch", "loss"),
    "day": ("partition", "step", "auc", "logloss", "rows"),
}
COUNTS = ("rows", "new", "admitted", "rejected", "expired", "evicted")


@dataclass
class Job:
    """overrides: of the configuration. data: which of those that `write_all` makes. The rest is as in WarmRanks."""

    overrides: tuple[str, ...]
    data: str = "mixed"
    world: int = 1
    script: str = "train"
    overlap: bool = False


JOBS = {
    "deepfm_bags": Job(
        (
            BAGS,
            "data.schema.weight=sample_weight",
            "model.batch_norm=true",
            "embedding.pooled_output_dist=auto",
            "optimizer.dense.clip_norm=0.5",
            "optimizer.sparse.name=rowwise_adagrad",
            "optimizer.sparse.lr=0.05",
            "optimizer.sparse.warmup_steps=4",
            "trainer.eval_every=5",
        ),
        world=2,
    ),
    "autoint_plus_int8": Job(
        (
            "model=autoint_plus",
            "model.attention_dim=8",
            "model.attention_dropout=0.1",
            "embedding.format=int8",
            "embedding.formats={c: int4}",
            "embedding.alpt.every=2",
            "embedding.alpt.lr=0.001",
            "optimizer.sparse.name=adam",
            "optimizer.sparse.lr=0.02",
            "optimizer.sparse.weight_decay=0.001",
            "trainer.max_steps=24",
            "trainer.epochs=2",
        ),
    ),
    "pin_static": Job(
        (
            "model=pin",
            "model.subnet=[4,1]",
            "numeric=autodis",
            "embedding=static",
            "embedding.rows=200",
            "embedding.l2=0.001",
            "optimizer.sparse.name=adagrad",
            "optimizer.sparse.lr=0.05",
        ),
        world=2,
    ),
    "fgcnn_life_of_rows": Job(
        (
            "model=fgcnn",
            "model.channels=[3]",
            "model.kernel=3",
            "model.conv_batch_norm=true",
            "model.classifier.hidden=[8]",
            "model.classifier.dropout=0.2",
            "numeric=bucketised",
            f"data.train=[{','.join(f'day={key_of(day)}' for day in range(DAYS - 1))}]",
            f"data.valid=day={key_of(DAYS - 1)}",
            "data.order=time",
            "embedding.admission.kind=exact",
            "embedding.admission.threshold=2",
            "embedding.ttl_days=1.5",
            "embedding.expire_every=2",
            "embedding.max_rows=64",
            "embedding.eviction=lru",
            "embedding.oov=learned",
            "embedding.init=oov",
            "optimizer.sparse.name=ftrl",
            "optimizer.sparse.l1=0.001",
            "trainer.checkpoint.every=4",
            "trainer.checkpoint.full_every=3",
        ),
        data="days",
    ),
    "daily_incremental": Job(
        (
            f"daily.to={key_of(2)}",
            "daily.full_every=2",
            "embedding.ttl_days=1",
            "daily.replay_rows=60",
            "daily.epochs=2",
            "trainer.distil.kind=self",
            "trainer.distil.max_epochs=3",
            "trainer.distil.temperature=2.0",
            "optimizer.sparse.old_rows_factor=0.5",
        ),
        data="days",
        world=2,
        script="daily",
    ),
    "dcn_v2_cached_bf16": Job(
        (
            "model=dcn_v2",
            "model.cross_layers=2",
            "embedding.cache_rows=450",
            "embedding.format=bf16",
            "embedding.transport=bf16",
            "embedding.l2=0.001",
            "optimizer.sparse.name=adam",
            "optimizer.sparse.lr=0.05",
            "optimizer.sparse.state_format=bf16",
            "optimizer.dense.name=adagrad",
            "trainer.checkpoint.every=7",
        ),
        world=2,
        overlap=True,
    ),
}


def write_all(folder: Path) -> None:
    """What the jobs read: `mixed`, one file for each split with bags and weights, and `days`, a folder for each."""
    write_days(folder / "days", DAYS, 200)
    write_data(folder / "mixed", ROWS)
    for split in ("train", "valid"):
        path, draw = folder / "mixed" / split / "part.parquet", np.random.default_rng(7)
        table = pq.read_table(path)
        count = table.num_rows
        lengths = draw.integers(0, 6, count)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tags, weights = draw.zipf(1.4, offsets[-1]).clip(max=100), draw.random(offsets[-1]).astype(np.float32)
        more = {
            "y": pa.array(draw.integers(0, 1000, count).astype(np.float32), mask=draw.random(count) < 0.2),
            "e": pa.array(draw.zipf(1.5, count).clip(max=300)),
            "tags": pa.ListArray.from_arrays(offsets, pa.array(tags)),
            "tag_weights": pa.ListArray.from_arrays(offsets, pa.array(weights)),
            "sample_weight": pa.array((0.5 + draw.random(count)).astype(np.float32)),
        }
        for name, column in more.items():
            table = table.append_column(name, column)
        pq.write_table(table, path, row_group_size=count // 20)


def measure(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Run a job in a new folder.

    Returns:
        losses: of every training step, over all ranks. results: lines of metrics.jsonl. counts: of rows of all tables
        at the end. bits: digests of states and models.
    """
    job, run_dir, output = JOBS[name], folder / name, folder / f"{name}.output"
    with_defaults = command if job.script == "daily" else arguments
    every = [f"trainer.batch_size={BATCH}", "trainer.log_every=1", "trainer.checkpoint.keep_last=9"]
    overrides = _without_unknown(with_defaults(data / job.data, run_dir, *every, *job.overrides))
    statuses = WarmRanks(job.script).run(job.world, overrides, output, overlap=job.overlap)
    assert statuses == [0] * job.world, output.read_text()
    lines = metrics_of(run_dir)
    tables = [line for line in lines if line["kind"] == "tables"]
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        "results": [
            {key: line[key] for key in RESULTS[line["kind"]] if key in line}
            for line in lines
            if line["kind"] in RESULTS
        ],
        "counts": {key: tables[-1][key] for key in COUNTS} if tables else {},
        "bits": {f"{folder.name}/{part}": digest for folder in _saved(run_dir) for part, digest in _bits(folder)},
    }


def _without_unknown(overrides: list[str]) -> list[str]:
    """FGCNN has no MLP of its own: that of its classifier is set apart."""
    if "model=fgcnn" not in overrides:
        return overrides
    return [one for one in overrides if not one.startswith(("model.hidden=", "model.dropout="))]


def _saved(run_dir: Path) -> list[Path]:
    """The newest state, the best model and every publication."""
    best = [run_dir / "best"] if (run_dir / "best").exists() else []
    return [newest(run_dir), *best, *sorted((run_dir / "published").glob("2*"))]


def _bits(saved: Path) -> Iterator[tuple[str, str]]:
    """Digests of dense tensors (all in one), and of each table's rows, waiting ids and ids given up. Rows in the order
    of ids, without the number that a row has in memory: they do not depend on how ids are spread."""
    yield "dense", _digest(tensors_of_state(saved))
    for kind in ("rows", "waiting", "gone"):
        for table, rows in rows_of_state(saved, kind, numbers=False).items():
            of_ids = {f"{one} {name}": value for one, columns in rows.items() for name, value in columns.items()}
            yield f"{kind}/{table}", _digest(of_ids | {str(one): b"" for one in rows})


def _digest(named: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(named):
        total.update(f"{name} {len(named[name])} ".encode() + named[name])
    return total.hexdigest()[:16]


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def write(name: str, found: Mapping[str, Any]) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
