"""Measure training steps per second of every model, Criteo-shaped: whole steps from parquet beside the tower alone.

`python scripts/bench/models.py --models deepfm,autoint_plus,fgcnn`: batch 4096, 13 numeric and 26 id fields, dim 16,
MLP 400x3, one process. "Tower alone" is forward, backward and Adam on one preloaded batch: the bound for the whole
step, which also reads, looks rows up, updates them and checks. With `--peer ENVIRONMENT` (made by
peers/deepctr_torch.sh) deepctr-torch's DeepFM, and its model of the same kind, take turns with each of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.network import build_tower
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process
from tessera.distributed.threads import restart_with_idle_threads_asleep
from tessera.scripts.bench.deepctr_torch import MODELS, Peer
from tessera.scripts.bench.timing import alternate

BATCH = 4096
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--models", default="deepfm,ipnn,autoint_plus,pin,fgcnn,dcn_v2,xdeepfm,final_mlp")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--steps", type=int, default=4, help="steps per round")
parser.add_argument("--fp32", action="store_true", help="leave bfloat16 out")
parser.add_argument("--data", type=Path, help="prepared synthetic data (default: 200,000 rows made for this run)")
parser.add_argument("--peer", type=Path, help="environment of deepctr-torch")
parser.add_argument("--peer-ids", type=int, default=2_700_000, help="rows of the peer's tables together")
options = parser.parse_args()


def tower_alone(config: Config) -> Callable[..., None]:
    schema = schema_of(config.data)
    tower = build_tower(config, schema)
    optimizer = torch.optim.Adam(tower.parameters(), fused=True)
    numeric, labels = torch.rand(BATCH, len(schema.numeric_names)), torch.randint(0, 2, (BATCH,)).float()
    shapes = {group: (BATCH, len(schema.id_names), dim) for group, dim in tower.embedding_dims.items()}
    embeddings = {group: torch.rand(shape, requires_grad=True) for group, shape in shapes.items()}

    def step(*, amp: bool) -> None:
        optimizer.zero_grad()
        for emb in embeddings.values():
            emb.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = tower(numeric, embeddings)
        F.binary_cross_entropy_with_logits(logits.float(), labels).backward()
        optimizer.step()

    return step


def whole(trainer: Trainer) -> Callable[..., None]:
    def endless() -> Iterator:
        epoch = 0
        while True:
            yield from (batch for batch in trainer.readers.train.epoch(epoch) if batch.rows == BATCH)
            epoch += 1

    batches = endless()

    def step(*, amp: bool) -> None:
        trainer.engine.model.module.amp = amp
        trainer.engine.train_step(next(batches))

    return step


def bench(config: Config, process: Process) -> None:
    heading = f"{'':<14}{'':>6}{'whole, ms':>11}{'samples/s':>12}{'tower, ms':>11}{'samples/s':>12}{'whole/tower':>13}"
    print(heading + (f"{'/ its DeepFM':>14}{'/ its own':>11}" if options.peer else ""))
    precisions = (False,) if options.fp32 else (False, True)
    for model in options.models.split(","):
        config = load(config.data.path, model)
        trainer = Trainer(config, process)
        from_parquet, alone = whole(trainer), tower_alone(config)
        contenders: dict[tuple[str, object], Callable[[], object]] = {
            (side, amp): partial(step, amp=amp)
            for amp in precisions
            for side, step in (("whole", from_parquet), ("tower", alone))
        }
        with contextlib.ExitStack() as stack:
            for name in {"DeepFM", MODELS.get(model, "DeepFM")} if options.peer else ():
                peer = stack.enter_context(Peer(options.peer, name, options.peer_ids, options.threads))
                contenders["peer", name] = peer.step
            medians = {name: 1e3 * s for name, s in alternate(contenders, options.rounds, options.steps).items()}
        trainer.log.close()
        for amp in precisions:
            show(model, medians, amp=amp)


def show(model: str, medians: dict, *, amp: bool) -> None:
    ours, bound = medians["whole", amp], medians["tower", amp]
    cells = [f"{milliseconds:>11.1f}{BATCH / milliseconds * 1e3:>12,.0f}" for milliseconds in (ours, bound)]
    cells.append(f"{bound / ours:>13.2f}")
    if options.peer:
        cells.append(f"{medians['peer', 'DeepFM'] / ours:>14.3f}")
        own = medians.get(("peer", MODELS.get(model)))
        cells.append(f"{own / ours:>11.2f}" if own else f"{'':>11}")
    print(f"{model:<14}{'bf16' if amp else 'fp32':>6}{''.join(cells)}", flush=True)


def load(data: str, model: str) -> Config:
    run_dir = tempfile.mkdtemp(dir=scratch)
    fixed = ["data=synthetic", f"data.path={data}", f"trainer.run_dir={run_dir}", f"model={model}"]
    plus = ["trainer.log_every=1000000", f"trainer.batch_size={BATCH}", f"trainer.threads={options.threads}"]
    # Two lanes with a row group each: one is decoded per four steps. With the usual ones the reader would decode all of
    # so small a data set before the first step, and no step would pay for it.
    reader = ["data.lanes=2", "data.window_rows=16384"]
    plus += ["optimizer.sparse.name=rowwise_adagrad", "optimizer.sparse.lr=0.05"]
    return load_config([*fixed, *plus, *reader], "")


if __name__ == "__main__":
    restart_with_idle_threads_asleep()  # as training runs
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or Path(scratch) / "data"
        if options.data is None:
            write_synthetic(SyntheticConfig(rows=200_000), data)
        sys.exit(run(lambda: (load(str(data), options.models.split(",")[0]), "cpu", 60.0), bench))
