"""Rank the fields of a trained model at scoring, without training: `tessera importance RUN`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.instantiate import class_of
from tessera.ctr.metrics.steering import higher_is_better, steering_value
from tessera.ctr.metrics.tasks import TaskMetrics
from tessera.ctr.network import Network, fields_of
from tessera.ctr.selection.field_groups import FieldGroup, field_groups
from tessera.ctr.selection.field_vectors import FieldVectors
from tessera.ctr.selection.permutation import permuted, row_order
from tessera.ctr.selection.result import Importance
from tessera.ctr.selection.sensitivity import Means, Probe, RatioOfSums
from tessera.ctr.train.step_pipeline import to_device
from tessera.ctr.train.task_loss import TaskLoss
from tessera.distributed.collectives import sum_over_ranks
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

#: method -> what its numbers are
METHODS = {
    "permutation": "how much {metric} gets worse when the field's values are permuted among the rows of a batch",
    "taylor": "mean over rows of | <dL/de, E[e] - e> |, e the field's vector and L the loss of the row (SHARK)",
    "sfs": "mean over batches of | dL/dm |, m = 1 a factor of the field's vectors and L the loss of the batch (SFS)",
}
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them the normal distribution's is near.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL_QUANTILE = 1.96


class Ranking:
    """The model of a run, its fields, and a split to rank them by. All ranks call its methods together."""

    def __init__(
        self, config: Config, model: DistributedModelParallel, reader: ParquetReader, process: Process, split: str
    ) -> None:
        self.config, self.reader, self.process, self._split = config, reader, process, split
        self.network: Network = model.module
        self.schema = schema_of(config.data)
        self.groups = field_groups(self.schema)
        self.metric = config.trainer.early_stop.metric
        self.higher_is_better = higher_is_better(self.schema.tasks, self.metric)
        self.scores: dict[str, float | None] = {}
        model.eval()

    def by(self, method: str, repeats: int) -> list[Importance]:
        """Return the fields, most important first.

        Raises ConfigError: the split has no rows of both labels, by which a metric is defined.
        """
        found = self._by_permutation(repeats) if method == "permutation" else self._by_gradients(method)
        return sorted(found, key=lambda one: -one.importance)

    def _batches(self) -> Iterator[tuple[int, Batch, dict[str, Tensor]]]:
        """Yield number, batch on the device and what was looked up for it."""
        for number, batch in enumerate(self.reader.epoch(0)):
            self.process.stage = f"importance on {self._split}, batch {number}"
            batch = to_device(batch, self.process.device)
            with torch.no_grad():
                yield number, batch, self.network.tables(batch.ids)

    def _logits(self, batch: Batch, embeddings: dict[str, Tensor]) -> Tensor:
        with torch.autocast(batch.numeric.device.type, torch.bfloat16, enabled=self.network.amp):
            return self.network.of_tower(batch, embeddings).float()

    def _by_permutation(self, repeats: int) -> list[Importance]:
        runs, base = [], None
        for repeat in range(repeats):
            plain, scores = self._permuted_once(repeat, with_base=base is None)
            base = plain if base is None else base
            runs.append(scores)
        assert base is not None
        self.scores = base
        names = [name for name, value in base.items() if value is not None and _is_quality(name)]
        if steering_value(base, self.metric) is None:
            raise ConfigError(f"{self.metric} is undefined on {self._split}, which lacks one of two labels")
        return [self._fall(number, base, [run[number] for run in runs], names) for number in range(len(self.groups))]

    def _fall(
        self, number: int, base: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], names: Sequence[str]
    ) -> Importance:
        """Return how much worse the metrics are with a field permuted, from those of each repeat."""
        sign = 1 if self.higher_is_better else -1
        falls = [sign * (_known(base, self.metric) - _known(run, self.metric)) for run in runs]
        mean, half = _mean_and_half_width(falls)
        others = {
            name: sum(_worse(name) * (_known(base, name) - _known(run, name)) for run in runs) / len(runs)
            for name in names
        }
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return Importance(self.groups[number].features, mean, low, high, others)

    @torch.no_grad()
    def _permuted_once(
        self, repeat: int, *, with_base: bool
    ) -> tuple[dict[str, float | None], list[dict[str, float | None]]]:
        """Return the metrics of the split as it is and with each field permuted. A repeat reads the split once, and
        looks each batch up once."""
        tasks, device = self.schema.tasks, self.process.device
        base, each = TaskMetrics(tasks, device), [TaskMetrics(tasks, device) for _ in self.groups]
        for number, batch, embeddings in self._batches():
            if with_base:
                base.update(self._logits(batch, embeddings), batch.labels, batch.known, batch.weight)
            for group, metrics in zip(self.groups, each, strict=True):
                logits = self._logits(*self._permuted(group, batch, embeddings, repeat, number))
                metrics.update(logits, batch.labels, batch.known, batch.weight)
        for metrics in [base, *each]:
            metrics.all_reduce(torch.distributed.group.WORLD)
        return base.compute() if with_base else {}, [metrics.compute() for metrics in each]

    def _permuted(
        self, group: FieldGroup, batch: Batch, embeddings: dict[str, Tensor], repeat: int, number: int
    ) -> tuple[Batch, dict[str, Tensor]]:
        seed, rank = self.config.trainer.seed, self.process.rank
        order = row_order(batch.rows, len(batch.labels), seed, group.name, repeat, number, rank)
        return permuted(self.schema, group, batch, embeddings, order)

    def _by_gradients(self, method: str) -> list[Importance]:
        fields = fields_of(self.config, self.schema)
        vectors = FieldVectors(self.network.tower, fields, class_of(self.config.numeric))
        means = self._means(vectors) if method == "taylor" else None
        trainer, data = self.config.trainer, self.config.data
        rate = data.negative_rate if self._split == "train" else 1.0
        loss = TaskLoss(self.schema.tasks, self.network.tower, self.process.rank, trainer.loss_divisor, rate)
        sums = RatioOfSums(len(self.groups), self.process.device)
        for _, batch, embeddings in self._batches():
            probe = Probe(self.groups, means, len(batch.labels), batch.numeric)
            weight = batch.weight.sum()
            sum_over_ranks(weight)
            with vectors.changed(probe), torch.enable_grad():
                summed = loss(self._logits(batch, embeddings), batch, float(weight))
                of_masks, of_shifts = probe.gradients(summed)
            if method == "taylor":
                sums.add(of_shifts.abs(), batch.weight)
            else:
                of_batch = of_masks.sum(0, keepdim=True)
                sum_over_ranks(of_batch)
                sums.add(of_batch.abs() / weight.clamp(min=1e-12), torch.ones_like(weight).unsqueeze(0))
        if method == "taylor":  # batches are those of all ranks already
            sums.all_reduce()
        found = []
        for group, mean, error in zip(self.groups, *sums.compute(), strict=True):
            half = NORMAL_QUANTILE * error
            found.append(Importance(group.features, mean, mean - half, mean + half))
        return found

    @torch.no_grad()
    def _means(self, vectors: FieldVectors) -> Means:
        """Return the mean vectors over the split."""
        means = Means()
        with vectors.changed(means):
            for _, batch, embeddings in self._batches():
                means.rows = batch.rows
                self._logits(batch, embeddings)
        for site in means.sums:
            sum_over_ranks(means.sums[site], means.counts[site])
        return means


def _mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half of its 95 % interval by Student's t; None of one value."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, None
    quantile = T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else NORMAL_QUANTILE
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, quantile * deviation / math.sqrt(n)


def _is_quality(name: str) -> bool:
    return name.rpartition(".")[2] in ("auc", "logloss", "mse", "mae")


def _worse(name: str) -> int:
    """Return the sign that makes a metric's fall a loss of quality."""
    return 1 if name.rpartition(".")[2] == "auc" else -1


def _known(metrics: Mapping[str, float | None], name: str) -> float:
    value = steering_value(metrics, name)
    assert value is not None  # the base has it, and so have the same labels
    return value
