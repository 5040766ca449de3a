"""Run one training step: batch, forward, loss, check for NaN and infinity, backward, step."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.schema import Schema
from tessera.ctr.distil.distillation import Distillation
from tessera.ctr.metrics.tasks import is_single
from tessera.ctr.metrics.windowed import WindowedRates
from tessera.ctr.network import Network, build_model
from tessera.ctr.selection.held_out import HeldOutGates
from tessera.ctr.tables import give_vocabularies
from tessera.ctr.train.nonfinite import check_gradients, check_loss, watch_gradients
from tessera.ctr.train.optimizers import Optimizers
from tessera.ctr.train.perturbed import perturbed
from tessera.ctr.train.progress import Progress
from tessera.ctr.train.state_parts import ModelState, Rates, Stateful
from tessera.ctr.train.step_pipeline import StepPipeline, to_device
from tessera.ctr.train.task_loss import TaskLoss, soft_loss
from tessera.distributed.collectives import sum_over_ranks
from tessera.distributed.rank import Process
from tessera.distributed.tables import Tables, as_dynamic, as_sharded
from tessera.distributed.window import WHOLE, Window
from tessera.embedding.errors import ConfigError


class Engine:
    """A model, its tables and its optimizers, which learn from one batch after the other. It reads no data and writes
    no files; loops over data have one (`Trainer`, `Daily`).

    Attributes:
        model: the sharded `network`; plan: how its tables are sharded, as text.
        dynamic: the tables once more if they are dynamic ones, which have steps, expiry and scales; else None.
        gates: those of the fields, if `selection` asks for them.
        loss: that to the labels; distil: the teacher's part of it, if there is one.
        rates: of the rows since the last log line.
        progress: where training stands; its step and clock move with each step.
        pipeline: gets batches ready for their steps.
        inside_step: more batches of the step follow (`trainer.accumulate`): nothing has been updated yet.

    Raises:
        ConfigError: a model or tables that cannot be built as configured.
    """

    def __init__(self, config: Config, schema: Schema, process: Process) -> None:
        self.config, self.schema, self.process = config, schema, process
        torch.manual_seed(config.trainer.seed)
        self.model, self.plan = build_model(config, schema, process)
        self.network: Network = self.model.module
        self.tables: Tables = self.network.tables
        give_vocabularies(config, schema, self.tables, process)
        self.gates = self.network.field_gates
        self.sharded, self.dynamic = as_sharded(self.tables), as_dynamic(self.tables)
        self.optimizers = Optimizers(config.optimizer, self.model)
        divisor, rate = config.trainer.loss_divisor, config.data.negative_rate
        self.loss = TaskLoss(schema.tasks, self.network.tower, process.rank, divisor, rate)
        distil = config.trainer.distil
        self.distil = None
        if distil.kind != "none" and is_single(schema.tasks) and schema.tasks[0].nulls == "bad":
            self.distil = Distillation(distil, process.device)
        elif distil.kind != "none":
            soft = soft_loss(schema.tasks, self.network.tower, process.rank, divisor)
            self.distil = Distillation(distil, process.device, schema.tasks, soft)
        self.rates = WindowedRates(schema.tasks, self.loss.shift, process.device)
        self.progress = Progress()
        self.pipeline = StepPipeline(config, self.tables, process, self.progress)
        self._batches = 0  # of the step that has begun
        self._weight = 0.0  # of these

    def parts(self) -> dict[str, Stateful]:
        """Return the parts of a saved state that the engine has, by name."""
        parts: dict[str, Stateful] = {
            "model": ModelState(self.model, self.process),
            "optimizers": self.optimizers,
            "progress": self.progress,
            "rates": Rates(self.rates),
        }
        if self.distil:
            parts["distil"] = self.distil
        return parts

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.progress.step

    @property
    def inside_step(self) -> bool:
        return self._batches > 0

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run one batch and, if it is the last one of its step, one update. Returns this rank's summed loss and summed
        sample weight, on the device, for the log."""
        ready = self.pipeline.take(batch)
        batch, learn_scales = ready.on_device, self._learns_scales()
        accumulate, number = self.config.trainer.accumulate, self._batches
        loss_scale, window = self._begin_batch(ready.weight)
        if self.dynamic:
            perturbs = self.config.optimizer.helen.rho > 0
            how = {"learn_scales": learn_scales, "perturbs": perturbs}
            self.dynamic.begin_step(ready.now, **how, times=ready.times, window=window)
        self.network.step = self.step * accumulate + number  # of which dropout draws its masks
        with self.pipeline.next_begun():
            logits, embeddings = self.model(batch)
        loss_sum = self.loss(logits, batch, ready.weight)
        teacher_loss = self.distil.loss(logits, batch, ready.weight) if self.distil else 0.0
        check_loss(loss_sum + teacher_loss, self.network, batch, embeddings, self.step)
        self.rates.add(logits, batch)
        watch_gradients(self.network, embeddings)
        self.process.stage = f"step {self.step}: backward" + f", batch {number + 1}" * (number > 0)
        if not number:
            self.optimizers.zero_grad()
        # This updates the rows of tables, too, but in a step of Helen: kernels/pool.py,
        # distributed/torchrec/answers.py, `_LookUp.backward` in distributed/torchrec/kernel.py, parts.py beside it,
        # `TableSet.update`, kernels/records.py.
        ((loss_sum + teacher_loss + self._added(embeddings, number)) * loss_scale).backward()
        if window.keeps:
            return loss_sum.detach(), batch.weight.sum()
        self.optimizers.scale_gradients(window.factor)
        check_gradients(self.network.dense_parameters(), self.step)
        if self.config.optimizer.helen.rho:
            self._train_perturbed(batch, ready.weight, loss_scale)
        dense_lr = self.optimizers.dense_lr
        self.optimizers.step()  # and sets the rates of the next step
        if self.gates:
            self.gates.after_step(dense_lr)
        if learn_scales:
            self._learn_scales(batch, ready.weight, loss_scale)
        self.progress.step += 1
        return loss_sum.detach(), batch.weight.sum()

    def learn_gates(self, batch: Batch) -> None:
        """Update the gates that learn on the valid split by one batch of it, and nothing else. Collective."""
        gates, network = self.gates, self.network
        assert isinstance(gates, HeldOutGates)
        self.process.stage = f"step {self.step}: gates"
        batch = to_device(batch, self.process.device)
        weight = batch.weight.sum()
        sum_over_ranks(weight)
        network.eval()
        try:
            with torch.no_grad():
                embeddings = network.tables(batch.ids)
            with gates.learning(self.config.trainer.seed, self.step) as learned:
                with torch.autocast(batch.numeric.device.type, torch.bfloat16, enabled=network.amp):
                    logits = network.of_tower(batch, embeddings)
                loss = self.loss(logits.float(), batch, weight)
                (gradient,) = torch.autograd.grad(loss, learned)
        finally:
            network.train()
        sum_over_ranks(gradient)
        gates.learn(gradient / weight)

    def expire_if_due(self) -> None:
        """Remove rows that no batch has touched for their table's TTL, every `embedding.expire_every` steps, among the
        next EXPIRE_ROWS rows of each table."""
        if self.dynamic and not self.inside_step and self.step % self.config.embedding.expire_every == 0:
            self.dynamic.expire(self.progress.now)

    def _begin_batch(self, weight: float) -> tuple[float, Window]:
        """Return by what the loss of the next batch is multiplied, and what the batch is to its step. weight: of the
        global batch.

        Ranks hold different numbers of rows and data parallel averages over ranks. With world size / weight the update
        is that of the mean over the global batch, however its rows are spread. Of several batches the weight of all is
        known with the last one: gradients are then multiplied by what is still missing. A step does not reach over
        the end of an epoch.
        """
        accumulate, ranks, nominal = (
            self.config.trainer.accumulate,
            self.process.world_size,
            self.config.trainer.batch_size,
        )
        if accumulate == 1:
            return ranks / max(weight, 1e-12), WHOLE
        self._batches, self._weight = self._batches + 1, self._weight * self.inside_step + weight
        if self._batches < accumulate and not self.pipeline.at_end():
            return ranks / nominal, Window(keeps=True)
        window = Window(factor=nominal / max(self._weight, 1e-12))
        self._batches = 0
        return ranks / nominal, window

    def _added(self, embeddings: dict[str, Tensor], number: int = 0) -> Tensor | float:
        """Return what is added to this rank's summed loss: L2 of rows and, with the first batch of a step, its part of
        the penalty of gates."""
        l2 = self._l2(embeddings)
        return l2 + self.gates.penalty() / self.process.world_size if self.gates and not number else l2

    def _l2(self, embeddings: dict[str, Tensor]) -> Tensor | float:
        """Return l2/2 times the squares of rows, summed over all look-ups of the batch, those of each id of a bag: rows
        that the batch does not touch do not decay."""
        strength = self.config.embedding.l2
        return 0.5 * strength * self.tables.squares_looked_up(embeddings) if strength else 0.0

    def _learns_scales(self) -> bool:
        """Return whether this step has a second pass, for the scales of quantised rows (ALPT)."""
        if self.dynamic is None or not self.dynamic.learns_scales:
            return False
        every = self.config.embedding.alpt.every
        assert every is not None  # without it no table has a scale to learn
        return self.step % every == 0

    def _learn_scales(self, batch: Batch, weight: float, loss_scale: float) -> None:
        """Run ALPT's second pass over the batch: the gradient of the loss to the updated rows as they would be rounded,
        and from it the scales with which they are stored. The tower has been updated and takes no part."""
        assert self.dynamic is not None  # no others learn scales
        self.process.stage = f"step {self.step}: scales"
        with self.dynamic.second_pass():
            self._pass_over_rows(batch, weight, loss_scale)

    def _train_perturbed(self, batch: Batch, weight: float, loss_scale: float) -> None:
        """Run Helen's second pass over the batch: the gradient of the loss to rows, at rows perturbed by their
        gradients of the first pass, and with it their update. Dense weights have not been updated yet. They keep the
        gradient of the first pass or, with `optimizer.helen.dense`, get theirs at perturbed weights, too."""
        assert self.dynamic is not None  # others are refused
        helen = self.config.optimizer.helen
        self.process.stage = f"step {self.step}: perturbed rows"
        self.dynamic.perturb(helen.rho, helen.xi)
        if not helen.dense:
            with self.dynamic.second_pass():
                self._pass_over_rows(batch, weight, loss_scale)
            return
        dense = self.network.dense_parameters()
        with perturbed(dense.values(), helen.rho), self.dynamic.second_pass(dense=True):
            logits, embeddings = self.model(batch)
            loss_sum = self._second_loss(logits, embeddings, batch, weight)
            ((loss_sum + self._added(embeddings)) * loss_scale).backward()
        check_gradients(dense, self.step)

    def _pass_over_rows(self, batch: Batch, weight: float, loss_scale: float) -> None:
        """Run forward and backward once more, for the gradients of rows alone."""
        logits, embeddings = self.network(batch)
        loss_sum = self._second_loss(logits, embeddings, batch, weight)
        pooled, l2 = list(embeddings.values()), self._l2(embeddings)
        grads = list(torch.autograd.grad(loss_sum * loss_scale, pooled))
        decays = isinstance(l2, Tensor)
        torch.autograd.backward(pooled + [l2 * loss_scale] * decays, grads + [None] * decays)

    def _second_loss(self, logits: Tensor, embeddings: dict[str, Tensor], batch: Batch, weight: float) -> Tensor:
        loss_sum = self.loss(logits, batch, weight)
        loss_sum = loss_sum + (self.distil.loss(logits, batch, weight, count=False) if self.distil else 0.0)
        check_loss(loss_sum, self.network, batch, embeddings, self.step)
        watch_gradients(self.network, embeddings)
        return loss_sum


def prepare_device(config: Config, process: Process) -> None:
    """Prepare this process for a run: `set_threads` and `set_tf32`.

    Raises ConfigError: this run's device cannot do what is configured.
    """
    if config.trainer.cuda_graphs and process.device.type != "cuda":
        raise ConfigError(
            "trainer.cuda_graphs is true and the run is on the CPU, which has none; "
            "set trainer.device=cuda or trainer.cuda_graphs=false"
        )
    set_threads(config)
    set_tf32(config, process)


def set_threads(config: Config) -> None:
    """Give each rank of a host an equal part of its cores, unless `trainer.threads` says how many."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.trainer.threads or max(1, cores // local_ranks))


def set_tf32(config: Config, process: Process) -> None:
    """Have a GPU multiply and convolve float32 matrices in TF32 or in full precision, as `trainer.tf32` says. On a CPU
    nothing changes."""
    if process.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.trainer.tf32


def slow_amp(config: Config, process: Process) -> str | None:
    """Return one sentence if a CPU that multiplies no bfloat16 matrices is to run the tower in bfloat16; else None."""
    if not config.trainer.amp or process.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "trainer.amp is true, and this CPU multiplies no bfloat16 matrices (that takes AVX-512): steps take several "
        "times as long as with trainer.amp=false"
    )
