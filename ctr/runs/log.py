"""A run's folder: resolved config, versions, plan, log, metrics.jsonl, whose numbers loggers get. Rank 0 writes."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tessera.ctr.config import Config, as_yaml
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.labels import labels_of
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.metrics.tasks import in_words, shown
from tessera.ctr.report.about import installed_versions
from tessera.ctr.runs.folder import RunFolder
from tessera.ctr.runs.loggers import Logger, check_installed, named_values, open_loggers
from tessera.ctr.train.engine import Engine
from tessera.ctr.train.state_parts import FoundState, PartState
from tessera.distributed.atomic import sync_file
from tessera.distributed.collectives import gather_objects, on_first_rank, sum_over_ranks
from tessera.distributed.host_manager import CacheStats
from tessera.distributed.plan import size
from tessera.distributed.rank import Process
from tessera.distributed.saved.storage import Storage
from tessera.kernels import backend

PACKAGES = ("tessera-ctr", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "pyarrow", "numpy", "hydra-core")


class RunLog:
    """Writes what happens in a run. On other ranks than 0 it only takes part in the sums."""

    def __init__(self, config: Config, process: Process, plan: str) -> None:
        self._config, self._process, self._plan = config, process, plan
        self._labels = labels_of(config.data.schema.labels)
        on_first_rank(process, lambda: check_installed(config.trainer.loggers))
        model = config.model["target"].rpartition(".")[2].lower()
        default = f"runs/{config.data.name}-{model}-{datetime.now():%Y%m%d-%H%M%S}"
        run = RunFolder(config, default, process)
        self.folder, self.may_go_on, self._lock = run.path, run.may_go_on, run.lock
        self._logger = logging.getLogger("tessera")
        self._loggers: list[Logger] = []
        if process.is_main:
            self._open()
        self.sums = torch.zeros(3, dtype=torch.float64, device=process.device)
        self._started = self._window_started = time.perf_counter()
        self._waited = 0.0
        self._epoch = 0  # of the last step
        self._bar: tqdm | None = None
        self._tables_before = {"admitted": 0, "expired": 0, "evicted": 0}

    def _open(self) -> None:
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        for handler in (_Printed(sys.stdout), _Written(self.folder / "train.log")):
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            self._logger.addHandler(handler)
        header, *tables, total = self._plan.splitlines()
        self.say(f"{header}; {total} (plan.txt)")

    def _describe(self) -> None:
        """Write what the run is made of. Not before it is known to go on: a job that is refused changes nothing."""
        (self.folder / "config.yaml").write_text(as_yaml(self._config))
        (self.folder / "plan.txt").write_text(self._plan + "\n")
        (self.folder / "versions.json").write_text(
            json.dumps(versions() | precision(self._process.device), indent=2) + "\n"
        )
        copy_teacher(self._config, self.folder)

    def begin(self, step: int, state: dict | None) -> None:
        """Continue from `state` of this folder's run, forgetting what was written after it; or (None) from nothing."""
        state = state or {}
        self._started -= state.get("seconds", 0.0)
        self._tables_before |= state.get("tables_before", {})
        interval = state.get("interval", {})
        self._window_started -= interval.get("seconds", 0.0)
        self._epoch = interval.get("epoch", 0)
        if self._process.is_main:
            self._describe()
            metrics, size = self.folder / "metrics.jsonl", state.get("metrics_bytes", 0)
            if metrics.exists():
                os.truncate(metrics, min(size, metrics.stat().st_size))
            names, values, after = self._config.trainer.loggers, named_values(self._config), step
            self._loggers = open_loggers(names, self.folder, values, self.warn, after if self.may_go_on else None)

    def state(self) -> PartState:
        """Return the state from which `begin` continues (only rank 0's counts), and each rank's sums since the last log
        line."""
        metrics = self.folder / "metrics.jsonl"
        state = {
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "seconds": time.perf_counter() - self._started,
            "tables_before": self._tables_before,
            "interval": {"seconds": time.perf_counter() - self._window_started, "epoch": self._epoch},
        }
        return PartState({"log": state}, rank_tensors={"sums": self.sums})

    def load(self, found: FoundState) -> None:
        """Begin behind the state's step. What another run has logged stays there, but for the sums."""
        found.take_sums("sums", self.sums)
        self.begin(found.saved.step, found.training["log"] if found.is_own else None)

    def sync(self) -> None:
        """Make what was written to metrics.jsonl durable, as a state counts on it."""
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            sync_file(metrics)

    def passed_over(self, readers: Mapping[str, ParquetReader | None]) -> None:
        """Say which entries of the data set were left out because they hold no rows."""
        names = sorted({name for reader in readers.values() if reader for name in reader.passed_over})
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.warn(f"passed over {len(names)} entries that hold no rows: {', '.join(names[:3])}{more}")

    def warn(self, sentence: str) -> None:
        self.say(f"warning: {sentence}")

    def say(self, sentence: str) -> None:
        if self._process.is_main:
            with tqdm.external_write_mode(sys.stdout):
                self._logger.info(sentence)

    def progress(self, batches: Iterable[Batch], reader: ParquetReader, epoch: int) -> Iterator[Batch]:
        """Pass batches on, timing the wait for each; with a bar on rank 0 where stderr is a terminal."""
        shown = self._process.is_main and sys.stderr.isatty()
        done, steps = reader.steps_done, reader.steps_per_epoch
        self._bar = tqdm(initial=done, total=steps, desc=f"epoch {epoch}", unit="step", disable=not shown, leave=False)
        iterator = iter(batches)
        with self._bar:
            while True:
                self._process.stage = "reading a batch"
                began = time.perf_counter()
                batch = next(iterator, None)
                self._waited += time.perf_counter() - began
                if batch is None:
                    return
                yield batch
                self._bar.update()

    def train(self, engine: Engine, batch: Batch, loss_sum: Tensor, weight: Tensor) -> None:
        """Add one batch of this rank. Every `log_every` steps log them, which alone waits for the device."""
        rows = torch.full_like(weight, batch.rows)
        self.sums += torch.stack([loss_sum.double(), weight.double(), rows.double()])
        self._epoch = engine.progress.epoch
        if not engine.inside_step and engine.step % self._config.trainer.log_every == 0:
            self.interval(engine)

    def interval(self, engine: Engine) -> None:
        """Log the steps since the last line over all ranks, and how tables and caches are; nothing without steps.

        Raises what a kernel on a GPU skipped in these steps (`backend.check`): the host waits for the GPU here anyway.
        """
        backend.check(self._process.device)
        sum_over_ranks(self.sums, engine.rates.make_sums())
        rates = engine.rates.take()
        total_loss, total_weight, total_rows = self.sums.tolist()
        self.sums.zero_()
        if not total_rows:
            return
        now, optimizers = time.perf_counter(), engine.optimizers
        seconds = now - self._window_started
        line = {
            "kind": "train",
            "step": engine.step,
            "epoch": self._epoch,
            "rows": int(total_rows),
            "loss": total_loss / total_weight if total_weight else None,
            **rates,
            "samples_per_second": total_rows / seconds,
            "reader_wait": min(1.0, self._waited / seconds),
            "dense_lr": optimizers.dense_lr,
            "sparse_lr": optimizers.sparse_lr,
            "seconds": now - self._started,
        }
        self._window_started, self._waited = now, 0.0
        self.write(line)
        self.say(
            f"step {engine.step} · loss {shown(line['loss'])} · {in_words(self._labels, rates)}{' · ' * bool(rates)}"
            f"{line['samples_per_second']:,.0f} samples/s · reader {line['reader_wait']:.0%}"
        )
        self.gates(engine.step, engine.network.tower.gates())
        if engine.dynamic:
            self.tables(engine.step, engine.dynamic.stats())
            self.cache(engine.step, engine.dynamic.cache_stats())

    def gates(self, step: int, gates: dict[str, Tensor]) -> None:
        """Write the mean share of each expert over the last batch, by gate: an expert that none uses is seen."""
        if not gates:
            return
        sums = [mean.double() / self._process.world_size for mean in gates.values()]
        sum_over_ranks(*sums)
        shares = {name: one.tolist() for name, one in zip(gates, sums, strict=True)}
        self.write({"kind": "gates", "step": step, "gates": shares})
        each = ((name, expert, share) for name, one in shares.items() for expert, share in enumerate(one))
        self._scalars({f"gates/{name}/{expert}": share for name, expert, share in each}, step)
        parts = [f"{name} {' '.join(f'{share:.2f}' for share in one)}" for name, one in shares.items()]
        self.say(f"step {step} · gates · {' · '.join(parts)}")

    def not_training(self, seconds: float) -> None:
        """Leave time that an evaluation took out of the speed of training."""
        self._window_started += seconds

    def tables(self, step: int, stats: dict[str, dict[str, float]]) -> None:
        """Sum the counts of dynamic tables over ranks; write them by table and say them in all."""
        if not stats:
            return
        names, keys = list(stats), ("rows", "bytes", "new", "admitted", "rejected", "expired", "evicted")
        counts = torch.tensor([[stats[name][key] for key in keys] for name in names], dtype=torch.float64)
        sum_over_ranks(counts)
        by_table = {name: dict(zip(keys, map(int, row), strict=True)) for name, row in zip(names, counts, strict=True)}
        total = dict(zip(keys, map(int, counts.sum(0)), strict=True))
        before, self._tables_before = self._tables_before, total
        self.write({"kind": "tables", "step": step, **total, "tables": by_table})
        drawn = ("rows", "bytes", "rejected", "expired", "evicted")
        self._scalars({f"tables/{name}/{key}": one[key] for name, one in by_table.items() for key in drawn}, step)
        gone = total["expired"] + total["evicted"] - before["expired"] - before["evicted"]
        self.say(
            f"step {step} · rows {total['rows']:,} (+{total['admitted'] - before['admitted']:,}, "
            f"−{gone:,} expired or evicted) · {size(total['bytes'])}"
        )

    def distil(self, step: int, epoch: int, loss: float | None) -> None:
        """Log the cross-entropy to the teacher per row of an epoch, times its weight."""
        self.write({"kind": "distil", "step": step, "epoch": epoch, "loss": loss})
        self.say(f"step {step} · epoch {epoch} · loss to the teacher {'undefined' if loss is None else f'{loss:.5f}'}")

    def cache(self, step: int, stats: CacheStats | None) -> None:
        """Sum what the caches of tables did since the last call over ranks; write it by table and say it in all."""
        if stats is None:
            return
        keys = ("hits", "misses", "written_back")
        counts = torch.tensor([[one[key] for key in keys] for one in stats.by_table.values()], dtype=torch.float64)
        seconds = torch.tensor([stats.waited_seconds, stats.busy_seconds], dtype=torch.float64)
        sum_over_ranks(counts, seconds)
        total = dict(zip(keys, map(int, counts.sum(0)), strict=True))
        by_table = {
            name: dict(zip(keys, map(int, row), strict=True)) for name, row in zip(stats.by_table, counts, strict=True)
        }
        waited, busy = (seconds / self._process.world_size).tolist()
        line = {
            "kind": "cache",
            "step": step,
            **total,
            "hit_rate": _hit_rate(total),
            "waited_seconds": waited,
            "busy_seconds": busy,
            "tables": by_table,
        }
        self.write(line)
        self._scalars({f"tables/{name}/hit_rate": _hit_rate(table) for name, table in by_table.items()}, step)
        self.say(
            f"step {step} · cache {line['hit_rate']:.1%} hits · {total['misses']:,} rows in, "
            f"{total['written_back']:,} out · host manager busy {busy:.2f} s, waited for {waited:.2f} s"
        )

    def evaluation(self, step: int, split: str, metrics: dict, *, is_best: bool) -> None:
        """Log an evaluation, during training, of the model as it was behind `step`."""
        self.write({"kind": "eval", "split": split, "step": step, **metrics})
        self.say(f"step {step} · {split} · {in_words(self._labels, metrics)}" + (" · best so far" if is_best else ""))

    def final_evaluation(self, step: int, model: str, split: str, metrics: dict) -> None:
        """Log the evaluation at the end of a run, of its `model` ("best" or "last"), which is that of `step`."""
        watched = split == "valid" and model == "best"  # loggers have its numbers of that step
        self.write({"kind": "eval", "split": split, "step": step, "model": model, **metrics}, scalars=not watched)
        self.say(f"{model} model, of step {step} · {split} · {in_words(self._labels, metrics)}")

    def day(self, number: int, step: int, record: dict) -> None:
        """One partition of a run over days (`DayRecord.to_json`), the `number`-th: that is the step for loggers."""
        self.write({**record, "kind": "day", "step": step, "number": number}, scalars=False)
        self._scalars(dict(_numbers_in(record, "day")), number)

    def published(self, number: int, size: int | None) -> None:
        """Bytes of what the `number`-th partition published, which are known after the rest of its record."""
        if size is not None:
            self._scalars({"day/published_bytes": size}, number)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.scalars(values, step)

    def write(self, line: dict, *, scalars: bool = True) -> None:
        """Append to metrics.jsonl, and (scalars) give its numbers to loggers."""
        if not self._process.is_main:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        prefix = line.get("split", line["kind"])
        if scalars:
            numbers = {
                f"{prefix}/{name.replace('.', '/')}": value
                for name, value in line.items()
                if isinstance(value, int | float) and name not in ("step", "epoch")
            }
            self._scalars(numbers, line["step"])

    def bad_rows(self, readers: dict[str, ParquetReader | None]) -> None:
        """Sum over ranks the rows that each split left out, and say how many for which reason."""
        counts = {split: reader.bad_row_counts for split, reader in readers.items() if reader is not None}
        gathered = gather_objects(counts)
        for split in counts:
            total: Counter[str] = Counter()
            for one in gathered:
                total.update(one[split])
            if total:
                self.write({"kind": "bad_rows", "split": split, "step": 0, "counts": dict(total)})
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(total.items()))
                self.say(f"{split}: left out {reasons}")

    def close(self) -> None:
        """Let the folder go. A second call does nothing."""
        for logger in self._loggers:
            logger.close()
        self._loggers = []
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)
            handler.close()
        if self._lock:
            self._lock.release()
            self._lock = None


class _EndsTheRun(logging.Handler):
    """Raises where a line cannot be written; logging would print a trace and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # noqa: PLE0704 (called where the error is being handled)


class _Printed(_EndsTheRun, logging.StreamHandler):
    """Lines on a stream."""


class _Written(_EndsTheRun, logging.FileHandler):
    """Lines in a file."""


def _numbers_in(record: dict, where: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record and of the mappings in it, with the way to them as name."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers_in(value, f"{where}/{name}")
        elif isinstance(value, int | float):
            yield f"{where}/{name}", value


def _hit_rate(counts: dict[str, int]) -> float:
    return counts["hits"] / max(1, counts["hits"] + counts["misses"])


def copy_teacher(config: Config, folder: Path) -> None:
    """Synthetic data says how good a model can be (teacher.json): the report shows it beside the result."""
    source = Storage(config.data.path)
    if source.exists("teacher.json"):
        (folder / "teacher.json").write_bytes(source.read("teacher.json"))


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return installed_versions(PACKAGES)


def precision(device: torch.device) -> dict[str, str]:
    """Return how a GPU multiplies float32 matrices (`trainer.tf32`), which a result depends on as it does on
    versions; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"float32 matrices": "TF32" if torch.backends.cuda.matmul.allow_tf32 else "float32"}
