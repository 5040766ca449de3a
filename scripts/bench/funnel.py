"""Conversion rates of models over several labels on the synthetic funnel, on clicked rows and on all:
`python -m tessera.scripts.bench.funnel --seeds 1 2 3`.

Models of one label are the same net without the other label's loss: of purchases, it learns from clicked rows alone.
All have the same widths and the epoch that was best on the valid split.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from tessera.ctr.config import load_config
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.synthetic_funnel import FunnelConfig, write_funnel
from tessera.ctr.metrics.exact import auc
from tessera.ctr.runs.score_rows import config_to_score, score_rows
from tessera.ctr.train.trainer import Trainer
from tessera.distributed import process as processes
from tessera.distributed.rank import Process

NET, HEAD = "[64,32]", "[16]"
LABELS = "data.schema.labels=[{{name: click, weight: {click}}}, {{name: buy, where: click, weight: {buy}}}]"
MODELS = {
    "clicks alone": ["model=dnn", f"model.hidden={NET}", LABELS.format(click=1, buy=0), "click.auc"],
    "purchases on clicked rows alone": ["model=dnn", f"model.hidden={NET}", LABELS.format(click=0, buy=1), "buy.auc"],
    "shared bottom": ["model=shared_bottom", f"model.bottom={NET}", f"model.head={HEAD}"],
    "MMoE": ["model=mmoe", f"model.expert={NET}", f"model.head={HEAD}", "model.gate=[]"],
    "PLE": ["model=ple", f"model.expert={NET}", f"model.head={HEAD}", "model.gate=[]"],
    "DBMTL": ["model=dbmtl", f"model.bottom={NET}", f"model.head={HEAD}", f"model.relation={HEAD}"],
    "ESMM": ["model=esmm", f"model.hidden={NET}"],
    "GNOLR": [
        *("model=gnolr", f"model.hidden={NET}", "model.user=[user_id,device,place,hour]"),
        *("model.shares=[0.1,0.02]", "model.slopes=[3.0,1.6]"),
    ],
}
COLUMNS = {"click": "CTR", "buy": "CVR, clicked rows", "buy_on_all_rows": "CVR, all rows", "click_and_buy": "CTCVR"}


def options(name: str, data: Path, run_dir: Path, seed: int, epochs: int) -> list[str]:
    """Return the overrides of a model's run."""
    *model, last = MODELS[name]
    metric = last if last.endswith(".auc") else "auc"
    return [
        *("data=synthetic_funnel", f"data.path={data}", f"trainer.run_dir={run_dir}", f"trainer.seed={seed}"),
        *(*model, *[last] * (metric == "auc"), "model.embedding_dim=8", f"trainer.early_stop.metric={metric}"),
        *(
            "embedding.rows=10000",
            "optimizer.sparse.lr=0.05",
            "optimizer.dense.lr=0.003",
            "trainer.batch_size=1024",
            f"trainer.epochs={epochs}",
        ),
        *("data.test=null", "trainer.device=cpu", "trainer.log_every=1000"),
    ]


def trained(name: str, data: Path, run_dir: Path, process: Process, seed: int, epochs: int) -> None:
    """Train and keep the best model, without drawing a report."""
    trainer = Trainer(load_config(options(name, data, run_dir, seed, epochs), ""), process)
    trainer.begin()
    while not trainer.finished:
        for batch in trainer.readers.train_batches(trainer.engine, trainer.log):
            trainer.engine.train_step(batch)
        trainer.progress.epoch += 1
        trainer.evaluate()
    trainer.checkpoints.close()
    trainer.log.close()


def measured(data: Path, run_dir: Path, process: Process) -> dict[str, float]:
    """Return AUC on the test split by column; purchases on all rows are those that would be made after a click."""
    keep = ["click", "buy", "would_buy"]
    scored = score_rows(config_to_score(run_dir, []), process, run_dir, data / "test", Path(f"{run_dir}-scores"), keep)
    table = pq.read_table([scored.folder / name for name in scored.names], partitioning=None)
    found = {name: table[name].to_numpy() for name in table.column_names}
    clicked = found["click"] == 1
    values = {
        "click": auc(found["prediction_click"], found["click"]),
        "buy": auc(found["prediction_buy"][clicked], found["buy"][clicked]),
        "buy_on_all_rows": auc(found["prediction_buy"], found["would_buy"]),
        "click_and_buy": auc(found["prediction_click_and_buy"], found["buy"]),
    }
    return {name: value for name, value in values.items() if value is not None}


def table(results: dict[str, list[dict[str, float]]], ceilings: list[dict[str, float]]) -> str:
    """Return markdown: the mean of the seeds and their spread, the ceilings in the last row."""
    lines = [f"| model | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    hidden: dict[str, tuple[str, ...]] = {
        "clicks alone": ("buy", "buy_on_all_rows", "click_and_buy"),
        "purchases on clicked rows alone": ("click", "click_and_buy"),
    }
    for name, runs in {**results, "best possible": ceilings}.items():
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append("" if column in hidden.get(name, ()) else f"{statistics.fmean(values):.4f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of data and models")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    chosen = parser.parse_args(arguments)
    process = processes.start("cpu", 300.0)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen.models}
    ceilings = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for seed in chosen.seeds:
                data = Path(scratch) / f"data-{seed}"
                found = write_funnel(FunnelConfig(rows=chosen.rows, seed=seed), data, Writing(row_group_rows=4096))
                ceilings.append({name: one["auc"] for name, one in found["splits"]["test"]["tasks"].items()})
                for name in chosen.models:
                    run_dir = Path(scratch) / f"run-{seed}-{name.replace(' ', '_')}"
                    trained(name, data, run_dir, process, seed, chosen.epochs)
                    results[name].append(measured(data, run_dir, process))
                print(table({name: runs for name, runs in results.items() if runs}, ceilings), flush=True)
    finally:
        processes.stop(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
