"""Measure DeepFM on one GPU from preloaded batches: samples per second, and the time of the parts of a step.

    python scripts/bench/gpu_deepfm.py [--rows 1000000] [--batch 4096] [--repeat 50] [--variants amp amp+compile]

Needs torch and Triton alone: it imports `kernels/`, `embedding/` and `ctr/models/`. A step is what the trainer does on
one rank without torchrec's exchange: merge the ids of each table, look rows up and gather them, pool them into
embeddings, tower and loss, backward, dense Adam, rows updated by the merged gradients. Criteo's shape: 13 numeric and
26 id fields, each with a table of its own, v of dim 16 and w of dim 1, MLP 400x3; power-law ids. Tables hold all ids
before.

Times are medians of CUDA events at the parts' borders over steps with different batches. A part's time includes what
the GPU waited for the host in it. Without a GPU the script runs a tiny size on the CPU and says so: that checks it, and
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ctr.models.deepfm import DeepFM
from tessera.ctr.models.tower import Fields
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.table import DynamicTable
from tessera.kernels import backend
from tessera.kernels.pool import pool
from tessera.kernels.unique import unique_inverse
from tessera.scripts.bench.gpu_tables import BATCHES, Sizes, drawn_rows, spread

PARTS = ("merge ids", "look up", "forward", "backward", "dense update", "row update")
#: name -> amp: bfloat16 tower; mode: of torch.compile
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "amp": {"amp": True},
    "amp+compile": {"amp": True, "mode": "default"},
    "amp+graphs": {"amp": True, "mode": "reduce-overhead"},
}


@dataclass(frozen=True)
class Shape:
    batch: int
    numeric: int
    ids: int
    rows: int  # of each table
    dim: int
    hidden: tuple[int, ...]


GPU_SHAPE = Shape(4096, 13, 26, 1_000_000, 16, (400, 400, 400))
CPU_SHAPE = Shape(64, 2, 3, 200, 4, (8,))


@dataclass
class Batch:
    """numeric [B, n] and label [B] float32; ids: int64 [B] of each table."""

    numeric: Tensor
    ids: list[Tensor]
    label: Tensor


class Clock:
    """Measures seconds of the parts of each step: by CUDA events, read after all steps, or by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: list[list] = []

    def begin(self) -> None:
        self._steps.append([])
        self.mark()

    def mark(self) -> None:
        """Record the end of a part."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._steps[-1].append(event)
        else:
            self._steps[-1].append(time.perf_counter())

    def medians(self, leave_out: int) -> tuple[float, list[float]]:
        """Return the median seconds of a step and of its parts, without the first `leave_out` steps."""
        if self._on_gpu:
            torch.cuda.synchronize()
        steps = self._steps[leave_out:]
        parts = [[self._between(a, b) for a, b in zip(step, step[1:], strict=False)] for step in steps]
        whole = statistics.median(self._between(step[0], step[-1]) for step in steps)
        return whole, [statistics.median(times) for times in zip(*parts, strict=True)]

    def _between(self, a: torch.cuda.Event | float, b: torch.cuda.Event | float) -> float:
        if isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event):
            return a.elapsed_time(b) / 1e3
        assert isinstance(a, float) and isinstance(b, float)
        return b - a


class Model:
    """A DeepFM tower over one dynamic table per id field."""

    def __init__(
        self, shape: Shape, device: torch.device, optimizer: str, *, amp: bool = False, mode: str | None = None
    ) -> None:
        torch.manual_seed(0)
        self.shape, self.device, self._amp = shape, device, amp
        groups = (Group("v", shape.dim, 0.01), Group("w", 1, 0.01))
        fields = [f"C{i}" for i in range(shape.ids)]
        row_optimizer = RowOptimizer(optimizer, lr=0.01)
        self.tables = [DynamicTable(DynamicTableConfig(f, (f,), groups, row_optimizer), device) for f in fields]
        for table in self.tables:
            for rows in torch.arange(shape.rows, device=device).split(1 << 17):
                table.lookup(spread(rows), 0)
        self.tower = DeepFM(
            Fields(tuple(f"I{i}" for i in range(shape.numeric)), tuple(fields)),
            shape.dim,
            shape.hidden,
            0.0,
            batch_norm=False,
        ).to(device)
        if mode is not None:
            self.tower.compile(mode=mode)
        self._dense = torch.optim.Adam(self.tower.parameters(), lr=0.001, fused=True)
        self._bounds = torch.arange(shape.ids * shape.batch + 1, device=device)  # every bag holds one id

    def step(self, batch: Batch, clock: Clock) -> Tensor:
        """One update. Returns the loss, on the device."""
        shape = self.shape
        clock.begin()
        merged = [unique_inverse(ids) for ids in batch.ids]
        sizes = [unique.numel() for unique, _, _ in merged]
        starts = [sum(sizes[:i]) for i in range(shape.ids)]
        index = torch.cat([inverse + start for (_, inverse, _), start in zip(merged, starts, strict=True)])
        clock.mark()
        found = [t.lookup(unique, 1, counts) for t, (unique, _, counts) in zip(self.tables, merged, strict=True)]
        rows = torch.cat([table.gather(one) for table, one in zip(self.tables, found, strict=True)]).requires_grad_()
        clock.mark()
        self._dense.zero_grad()
        v_bfd, w_bf1 = pool(rows, index, self._bounds, None, shape.ids, [shape.dim, 1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._amp):
            logits = self.tower(batch.numeric, {"v": v_bfd, "w": w_bf1})
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.label)
        clock.mark()
        loss.backward()
        clock.mark()
        assert rows.grad is not None
        self._dense.step()
        clock.mark()
        for table, one, grads, (unique, _, _) in zip(self.tables, found, rows.grad.split(sizes), merged, strict=True):
            table.update(one, grads, ids=unique)
        clock.mark()
        return loss.detach()


def drawn_batch(shape: Shape, seed: int, device: torch.device) -> Batch:
    sizes = Sizes(shape.ids, shape.batch, shape.dim, shape.rows, 0, 0)
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.rand(shape.batch, shape.numeric, generator=generator).to(device),
        [spread(drawn_rows(sizes, distinct=False, seed=1000 * seed + field)).to(device) for field in range(shape.ids)],
        torch.randint(0, 2, (shape.batch,), generator=generator).float().to(device),
    )


def bench(shape: Shape, device: torch.device, optimizer: str, variants: Sequence[str], repeat: int) -> None:
    batches = [drawn_batch(shape, seed, device) for seed in range(BATCHES)]
    print(f"{'':<14}{'samples/s':>12}{'ms/step':>10}" + "".join(f"{part:>20}" for part in PARTS))
    for name in variants:
        model, clock = Model(shape, device, optimizer, **VARIANTS[name]), Clock(device)
        warm = 2 * BATCHES  # compilation, the choice of matrix kernels, graphs
        for turn in range(warm + repeat):
            loss = model.step(batches[turn % BATCHES], clock)
        backend.check(device)
        assert torch.isfinite(loss), f"{name}: the loss is {loss.item()}"
        whole, parts = clock.medians(leave_out=warm)
        shares = "".join(f"{part * 1e3:>12.3f} ms {part / sum(parts):>4.0%}" for part in parts)
        print(f"{name:<14}{shape.batch / whole:>12,.0f}{whole * 1e3:>10.3f}{shares}", flush=True)
        del model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=GPU_SHAPE.rows, help="rows of each of the 26 tables")
    parser.add_argument("--batch", type=int, default=GPU_SHAPE.batch)
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--optimizer", default="rowwise_adagrad", help="of rows; or sgd, adagrad, adam, ftrl")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), help="all on a GPU, without compilation else")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        if backend.triton_problem is not None:
            sys.exit(f"gpu_deepfm: no Triton kernels ({backend.triton_problem}), nothing measured")
        import triton

        device, variants = torch.device("cuda", 0), arguments.variants or tuple(VARIANTS)
        shape = replace(GPU_SHAPE, batch=arguments.batch, rows=arguments.rows)
        where = f"{torch.cuda.get_device_name(device)} · triton {triton.__version__}"
    else:
        device, variants, shape = torch.device("cpu"), arguments.variants or ("fp32", "amp"), CPU_SHAPE
        where = "no GPU at hand, this is the CPU and a tiny size: it checks the script, the figures mean nothing"
    print(f"{where} · torch {torch.__version__} · python {platform.python_version()}")
    print(
        f"DeepFM: {shape.numeric} numeric fields, {shape.ids} tables of {shape.rows:,} rows, dim {shape.dim} and 1, "
        f"{arguments.optimizer}; MLP {'x'.join(map(str, shape.hidden))}; batch {shape.batch:,}, one id per field; "
        f"medians of {arguments.repeat} steps"
    )
    bench(shape, device, arguments.optimizer, variants, arguments.repeat)


if __name__ == "__main__":
    main()
