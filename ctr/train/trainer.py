"""Training: batch, forward, loss, guard, backward, step; evaluation, log and the kept best are visible lines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.models.network import Network, build_tables, build_tower
from tessera.ctr.report.report import write_report
from tessera.ctr.report.result import PREDICTIONS, begin_result, commit_result
from tessera.ctr.train.checkpoints import Checkpoints
from tessera.ctr.train.clock import Clock, ttl_in_vain
from tessera.ctr.train.distil import Distillation
from tessera.ctr.train.evaluate import evaluate, read_split
from tessera.ctr.train.guard import check_gradients, check_loss, watch_gradients
from tessera.ctr.train.look_ahead import LookAhead, ReadyBatch, to_device
from tessera.ctr.train.optimizers import Optimizers
from tessera.ctr.train.run_log import RunLog
from tessera.ctr.train.saved_model import load_model, save_model
from tessera.ctr.train.teacher_logits import prepare
from tessera.ctr.train.warm_start import warm_start
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.process import Process
from tessera.distributed.saved.row_files import ColumnSource
from tessera.distributed.saved.states import Saved
from tessera.distributed.sharding import shard
from tessera.distributed.side_stream import SideStream
from tessera.distributed.tables import Tables, growing, sharded
from tessera.embedding.errors import ConfigError

HIGHER_IS_BETTER = {"auc": True, "logloss": False}


class Trainer:
    """One run: a model, its data, its optimizers and its folder.

    Raises (before the run folder is made):
        ConfigError, SchemaError, DataError: what is wrong with the configuration or the files.
    """

    command = "scripts/train.py"  # whose states these are

    def __init__(self, config: Config, process: Process) -> None:
        self.config, self.process = config, process
        set_threads(config)
        check_device(config, process)
        torch.manual_seed(config.trainer.seed)
        self.schema = Schema(config.data.schema)
        self.readers = self.open_readers()
        self.model, plan = build_model(config, self.schema, process)
        self.tables: Tables = self.model.module.tables
        self.sharded, self.growing = sharded(self.tables), growing(self.tables)  # the tables again, if they are that
        self.optimizers = Optimizers(config.optimizer, self.model)
        self.log = RunLog(config, process, plan)
        self.log.passed_over(self.readers)
        self.steps_every = config.embedding.alpt.every if self.growing and self.growing.learns_steps else None
        distil = config.trainer.distil
        self.distil = None if distil.kind == "none" else Distillation(distil, process.device)
        self.step = self.epoch = self.now = 0
        self.clock = Clock(config, process)
        self.best: float | None = None
        self.evaluations_since_best = 0
        self.evaluated_step = -1
        self.batches: LookAhead | None = None
        self.ready: ReadyBatch | None = None  # the next step's batch, if this step has begun with it
        self.overlaps = process.device.type == "cuda" or bool(self.growing and self.growing.brings_ahead)
        self.ahead = SideStream(process.device)
        self.stopping = False  # a rank was asked to stop; all ranks learn it in the same step
        self.checkpoints = Checkpoints(self)
        self.begin()

    def open_readers(self) -> dict[str, ParquetReader | None]:
        """What is read: the splits train, valid and test, None for one that there is not."""
        readers = {s: read_split(self.config, self.schema, self.process, s) for s in ("train", "valid", "test")}
        if readers["train"] is None:
            raise ConfigError("data.train is null; training needs it")
        return readers

    def begin(self) -> None:
        """Go on from the newest state, or begin, with what another run has learnt if so configured."""
        if not self.checkpoints.resume():
            self.log.begin(0, None)
            if self.config.trainer.warm_start.path is not None:
                warm_start(self)

    def fit(self) -> None:
        """Train for the configured epochs or steps; evaluate, keep the best model, score it, write the report."""
        every = self.config.trainer.eval_every
        self.process.can_stop_later = True
        if in_vain := ttl_in_vain(self.config, self.readers["train"]):
            self.log.warn(in_vain)
        if self.distil and not self.finished:
            prepare(self)
        while not self.finished:
            for _ in self.steps(self.readers["train"]):
                if every and self.step % every == 0:
                    self.evaluate()
                self.checkpoints.after_step()
                if self.finished:
                    break
            else:
                self.epoch += 1
                if self.distil:
                    self.log.distil(self.step, self.epoch, self.distil.end_epoch())
                if not every:
                    self.evaluate()
                self.checkpoints.after_epoch()
            self.batches = None  # its threads end
        self.log_interval()
        self.evaluate()
        self.checkpoints.save()
        self.checkpoints.close()
        self.process.can_stop_later = False
        self.report()

    def steps(self, reader: ParquetReader) -> Iterator[Batch]:
        """Train on the batches of this epoch that are left, one step each; yields the batch behind each step."""
        batches = reader.epoch(self.epoch)
        if not reader.steps_done:
            self.now = 0  # the clock of the tables: an epoch may begin with older days than the last one ended with
        self.batches = LookAhead(self.log.progress(batches, reader, self.epoch))
        for batch in self.batches:
            loss_sum, weight = self.train_step(batch)
            if self.growing and self.step % self.config.embedding.expire_every == 0:
                self.growing.expire(self.now)
            if self.log.train(self.step, self.epoch, batch.rows, loss_sum, weight, self.optimizers):
                self.log_tables()
            yield batch

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One update. Returns this rank's summed loss and summed sample weight, on the device, for the log."""
        network: Network = self.model.module
        self.process.stage = f"step {self.step}: forward"
        ready = self.get_ready(batch) if self.ready is None else self.ready
        assert ready.batch is batch
        self.ahead.begin_step(ready)
        batch, self.now, self.stopping = ready.on_device, ready.now, ready.stop
        learn_steps = self.steps_every is not None and self.step % self.steps_every == 0
        if self.growing:
            self.growing.begin_step(self.now, learn_steps, ready.times)
        network.step = self.step
        self.ready = self.get_next_ready()
        logits, embeddings = self.model(batch)
        self.send_next()
        loss_sum = F.binary_cross_entropy_with_logits(logits, batch.labels[:, 0], batch.weight, reduction="sum")
        teacher_loss = self.distil.loss(logits, batch) if self.distil else 0.0
        check_loss(loss_sum + teacher_loss, network, batch, embeddings, self.step)
        watch_gradients(network, embeddings)
        # Ranks hold different numbers of rows and data parallel averages over ranks. With this scale the update is
        # that of the mean over the global batch, however its rows are spread.
        scale = self.process.world_size / max(ready.weight, 1e-12)
        self.process.stage = f"step {self.step}: backward"
        self.optimizers.zero_grad()
        ((loss_sum + teacher_loss + self.l2(embeddings)) * scale).backward()
        check_gradients(network.dense_parameters(), self.step)
        self.optimizers.step()
        if learn_steps:
            self.learn_step_sizes(batch, scale)
        self.step += 1
        return loss_sum.detach(), batch.weight.sum()

    def learn_step_sizes(self, batch: Batch, scale: float) -> None:
        """ALPT's second pass over the batch: the gradient of the loss to the updated rows as they would be rounded,
        and from it the step sizes with which they are stored. The tower has been updated and takes no part."""
        network: Network = self.model.module
        self.process.stage = f"step {self.step}: step sizes"
        with self.growing.second_pass():
            logits, embeddings = network(batch)
            loss_sum = F.binary_cross_entropy_with_logits(logits, batch.labels[:, 0], batch.weight, reduction="sum")
            loss_sum = loss_sum + (self.distil.loss(logits, batch, count=False) if self.distil else 0.0)
            check_loss(loss_sum, network, batch, embeddings, self.step)
            watch_gradients(network, embeddings)
            pooled, l2 = list(embeddings.values()), self.l2(embeddings)
            grads = list(torch.autograd.grad(loss_sum * scale, pooled))
            decays = isinstance(l2, Tensor)
            torch.autograd.backward(pooled + [l2 * scale] * decays, grads + [None] * decays)

    def get_ready(self, batch: Batch) -> ReadyBatch:
        """Agree on a batch, bring it to the device and, where steps overlap, begin to send its ids to their owners."""
        agreed = self.clock.agree(batch, self.now)  # before it goes to the device: these are numbers for the host
        with self.ahead.queued():
            on_device = to_device(batch, self.process.device)
            times = on_device.time if self.clock.of_events else None
            sends = self.overlaps and self.sharded is not None
            sent = self.sharded.prepare(on_device.ids, agreed.now, times) if sends else None
        return ReadyBatch(batch, on_device, sent, times, *agreed)

    def get_next_ready(self) -> ReadyBatch | None:
        """Begin with the next step's batch while this step is trained, on a GPU or where tables have a cache; unless
        something looks at the tables or the reader between the two steps, which must not see what is ahead."""
        if not self.overlaps or self.batches is None or self.pauses_after(self.step + 1):
            return None
        coming = self.batches.peek()
        self.process.stage = f"step {self.step}: forward"
        return None if coming is None else self.get_ready(coming)

    def send_next(self) -> None:
        """Send the ids of the next step's batch, of which their owners know the number now. The device is busy with
        the forward pass of this step."""
        if self.sharded:
            with self.ahead.queued():
                self.sharded.send_prepared()

    def pauses_after(self, step: int) -> bool:
        """Whether rows may expire, or there is an evaluation, a saved state or the end, between a step and the next.
        The same on all ranks. A log line is not among them: it must not change what is trained."""
        trainer, embedding = self.config.trainer, self.config.embedding
        expiry = None if embedding.ttl_days is None else embedding.expire_every
        every = (expiry, trainer.eval_every, trainer.checkpoint.every, trainer.max_steps)
        return self.stopping or any(number is not None and step % number == 0 for number in every)

    def l2(self, embeddings: dict[str, Tensor]) -> Tensor | float:
        """l2/2 times the squares of rows, summed over all look-ups of the batch, those of each id of a bag: rows that
        the batch does not touch do not decay."""
        strength = self.config.embedding.l2
        return 0.5 * strength * self.tables.squares_looked_up(embeddings) if strength else 0.0

    def state(self) -> dict[str, Any]:
        """What is saved in a state's description besides what `Checkpoints` knows of. Plain numbers and strings."""
        return {"reader": self.readers["train"].state()}

    def state_files(self) -> dict[tuple[str, str], ColumnSource]:
        """Ids that are saved beside the rows: (kind, table) -> columns."""
        return {}

    def load_state(self, saved: Saved) -> None:
        """Take over what the two methods above gave. Called when the model is loaded."""
        self.readers["train"].load_state(saved.training["reader"])

    def states_to_keep(self) -> set[str]:
        """Names of states that are kept besides the newest ones."""
        return set()

    @property
    def finished(self) -> bool:
        trainer = self.config.trainer
        patience = trainer.early_stop.patience
        out_of_patience = patience is not None and self.evaluations_since_best >= patience
        enough = trainer.max_steps is not None and self.step >= trainer.max_steps
        one_more = self.epoch < trainer.epochs or (self.distil is not None and self.distil.wants_more(self.epoch))
        return out_of_patience or enough or not one_more

    def log_interval(self) -> None:
        """Log the steps since the last line: a run, or a day, may end before the next line is due."""
        if self.log.interval(self.step, self.optimizers):
            self.log_tables()

    def log_tables(self) -> None:
        """Log the counts of tables whose rows come and go, and what their caches did."""
        if self.growing:
            self.log.tables(self.step, self.growing.stats())
            self.log.cache(self.step, self.growing.cache_stats())

    def evaluate(self) -> None:
        """Score the valid split; keep the model if it is the best so far. All ranks see the same numbers."""
        if self.readers["valid"] is None or self.evaluated_step == self.step:
            return
        began, self.evaluated_step = time.perf_counter(), self.step
        metrics = evaluate(self.model, self.readers["valid"], self.process)
        name = self.config.trainer.early_stop.metric
        value = metrics[name]
        better = value is not None and (
            self.best is None or (value > self.best if HIGHER_IS_BETTER[name] else value < self.best)
        )
        self.log.evaluation(self.step, "valid", metrics, better)
        if better:
            self.best, self.evaluations_since_best = value, 0
            save_model(self.model, self.log.folder / "best", self.process, self.step)
        else:
            self.evaluations_since_best += 1
            self.optimizers.after_evaluation(self.evaluations_since_best)
        self.log.not_training(time.perf_counter() - began)

    def report(self) -> None:
        """Score the best model (without any evaluation, the last one) on the valid and test splits; write the report.

        Predictions and report take the place of those of an earlier end of this run as one thing.
        """
        folder, process = self.log.folder, self.process
        model, step = "best" if self.best is not None else "last", self.step
        if model == "best":
            step = load_model(self.model, folder / "best", process)
        else:
            save_model(self.model, folder / "best", process, step)
        new = on_first_rank(process, lambda: begin_result(folder))
        scored = {}
        for split in ("valid", "test"):
            if self.readers[split] is not None:
                metrics = evaluate(self.model, self.readers[split], process, new / PREDICTIONS, split)
                self.log.final_evaluation(step, model, split, metrics)
                scored[split] = metrics["rows"]
        process.stage = "writing the report"
        self.log.bad_rows(self.readers)
        wait_for_all()  # all predictions are written
        report = on_first_rank(process, lambda: self._write_report(new, scored))
        if not scored:
            self.log.say("nothing was scored: data.valid and data.test are null")
        self.log.say(report)
        self.log.close()

    def _write_report(self, new: Path, scored: dict[str, int]) -> str:
        """On the first rank. Returns the report's summary."""
        folder = self.log.folder
        report = write_report(folder, result=new, scored=scored)
        commit_result(folder)
        return report.summary()


def build_model(config: Config, schema: Schema, process: Process) -> tuple[DistributedModelParallel, str]:
    """The sharded model, with the same initial values on any number of ranks, and its plan as text."""
    tower = build_tower(config, schema)
    if config.trainer.compile:
        tower.compile(mode=compiler_mode(config, process.device))
    tables, trainer = build_tables(config, schema, tower), config.trainer
    network = Network(tables, tower, schema.id_names, trainer.amp, trainer.seed)
    return shard(network, network.tables, process, -(-config.trainer.batch_size // process.world_size))


def compiler_mode(config: Config, device: torch.device) -> str | None:
    """torch.compile's. Its CUDA graphs are recorded for each size of batch, the short last ones of an epoch too."""
    return "reduce-overhead" if config.trainer.cuda_graphs and device.type == "cuda" else None


def check_device(config: Config, process: Process) -> None:
    """Raise ConfigError for what this run's device cannot do."""
    if config.trainer.cuda_graphs and process.device.type != "cuda":
        raise ConfigError(
            "trainer.cuda_graphs is true and the run is on the CPU, which has none; "
            "set trainer.device=cuda or trainer.cuda_graphs=false"
        )


def set_threads(config: Config) -> None:
    """Give each rank of a host an equal part of its cores, unless configured."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.trainer.threads or max(1, cores // local_ranks))
