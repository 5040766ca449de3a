"""Metrics of a stream of batches by label, and of the joint probabilities of funnels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.label_spaces import joint_label, joint_logit, known_in_space
from tessera.ctr.data.labels import Label, joint_name
from tessera.ctr.metrics.grouped import StreamingGauc
from tessera.ctr.metrics.streaming import StreamingMetrics, rows_of
from tessera.distributed.collectives import sum_over_ranks

MEANS = ("auc", "logloss")


@dataclass(frozen=True)
class Answer:
    """What of a model's logits is measured and predicted: a label in its own space or, joint, the product of a funnel.

    name: as in metrics and predictions; empty where there is one label. number: of the label.
    """

    name: str
    number: int
    label: Label
    joint: bool = False

    def key(self, metric: str) -> str:
        """Return the name of one of its metrics: buy.auc, or auc where there is one label."""
        return f"{self.name}.{metric}" if self.name else metric


def is_single(labels: Sequence[Label]) -> bool:
    """Return whether there is one label, of 0 and 1: then metrics, predictions and reports have no name of a label."""
    return len(labels) == 1 and not labels[0].is_number


def answers_of(labels: Sequence[Label]) -> list[Answer]:
    """Return the answers of a model over these labels: each label, then the joint probabilities of funnels."""
    if is_single(labels):
        return [Answer("", 0, labels[0])]
    own = [Answer(label.name, i, label) for i, label in enumerate(labels)]
    chained = [i for i, label in enumerate(labels) if label.parent is not None and not label.is_number]
    return own + [Answer(joint_name(labels, i), i, labels[i], joint=True) for i in chained]


def logit_of(answer: Answer, labels: Sequence[Label], logits: Tensor) -> Tensor:
    """Return the logits [B] of an answer, of what the tower returned, [B] or [B, T]."""
    if answer.joint:
        return joint_logit(labels, answer.number, logits)
    return logits if logits.dim() == 1 else logits[:, answer.number]


def label_of(
    answer: Answer, labels: Sequence[Label], values_bt: Tensor, known_bt: Tensor | None, weight_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the labels [B] of an answer, and the weights [B] with 0 where it does not count."""
    if answer.joint:
        value, mask = joint_label(labels, answer.number, values_bt, known_bt)
    else:
        value = values_bt[:, answer.number]
        mask = known_in_space(labels, answer.number, values_bt, known_bt)
    return value, weight_b if mask is None else weight_b * mask


def prediction_of(answer: Answer, logit: Tensor) -> Tensor:
    """Return what a model says of a label: a probability, or the number itself."""
    return logit if answer.label.is_number else torch.sigmoid(logit)


class NumberMetrics:
    """Errors of a label that is a number, from float64 sums."""

    def __init__(self) -> None:
        self._sums = torch.zeros(7, dtype=torch.float64)

    def to(self, device: torch.device | str) -> NumberMetrics:
        self._sums = self._sums.to(device)
        return self

    @torch.no_grad()
    def update(self, value: Tensor, label: Tensor, weight: Tensor) -> None:
        """Add a batch, as `StreamingMetrics.update`; value: what the model says."""
        value, label, weight = value.double(), label.double(), weight.double()
        counted = weight > 0
        finite = torch.isfinite(value) & torch.isfinite(label)
        value, label, weight = (torch.where(counted & finite, one, 0.0) for one in (value, label, weight))
        error = value - label
        self._sums += torch.stack(
            [
                weight.sum(),
                (weight * error.square()).sum(),
                (weight * error.abs()).sum(),
                (weight * value).sum(),
                (weight * label).sum(),
                (counted & finite).sum().double(),
                (counted & ~finite).sum().double(),
            ]
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the other ranks' rows."""
        sum_over_ranks(self._sums, group=group)

    def compute(self) -> dict[str, float | None]:
        """Return mse, mae, mean_prediction, mean_label (None without rows) and rows.

        Raises DataError: some values or labels were not finite.
        """
        weight, *sums, rows, not_finite = self._sums.tolist()
        if not_finite:
            raise DataError(f"metrics: {int(not_finite):,} rows have a prediction or label that is not finite")
        names = ("mse", "mae", "mean_prediction", "mean_label")
        means = {name: one / weight if weight else None for name, one in zip(names, sums, strict=True)}
        return means | {"rows": int(rows)}


class TaskMetrics:
    """Metrics of every answer of a model. Of a single label they are those of `StreamingMetrics`, by their own names;
    of several each has the name of its label in front, beside the means of auc and logloss over the labels."""

    def __init__(self, labels: Sequence[Label], device: torch.device | str, *, grouped: bool = False) -> None:
        """grouped: measure GAUC, too, of labels of 0 and 1; batches then come with the groups of their rows."""
        self.labels, self.answers = tuple(labels), answers_of(labels)
        self._of = [
            NumberMetrics().to(device) if answer.label.is_number else StreamingMetrics().to(device)
            for answer in self.answers
        ]
        self._groups = [StreamingGauc() if grouped and not one.label.is_number else None for one in self.answers]
        self._rows = torch.zeros((), dtype=torch.int64, device=device)

    def update(
        self,
        logits: Tensor,
        values_bt: Tensor,
        known_bt: Tensor | None,
        weight_b: Tensor,
        group_b: Tensor | None = None,
    ) -> None:
        """Add a batch. logits: [B] or [B, T]; the others as in `Batch`."""
        self._rows += (weight_b > 0).sum()
        for answer, metrics, groups in zip(self.answers, self._of, self._groups, strict=True):
            value, weight = label_of(answer, self.labels, values_bt, known_bt, weight_b)
            logit = logit_of(answer, self.labels, logits)
            metrics.update(logit, value, weight)
            if groups is not None:
                assert group_b is not None
                groups.update(logit, value, weight, group_b)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the other ranks' rows."""
        for metrics in self._of:
            metrics.all_reduce(group)
        sum_over_ranks(self._rows, group=group)

    def compute(self) -> dict[str, float | None]:
        """Return the metrics by name: those of one label as they are, of several `buy.auc`; auc and logloss alone are
        then means over the labels, None where one is undefined; rows: of positive weight. Collective where grouped.

        Raises DataError: as `StreamingMetrics.compute`.
        """
        found = [metrics.compute() for metrics in self._of]  # which raises on all ranks before a GAUC is computed
        for one, groups in zip(found, self._groups, strict=True):
            if groups is not None:
                one["gauc"] = groups.compute()
        if is_single(self.labels):
            return found[0]
        own = [one for answer, one in zip(self.answers, found, strict=True) if not answer.joint and "auc" in one]
        whole: dict[str, float | None] = {name: mean_of([one[name] for one in own]) for name in MEANS}
        whole["rows"] = int(self._rows)
        for answer, one in zip(self.answers, found, strict=True):
            whole |= {answer.key(name): value for name, value in one.items()}
        return whole


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean; None without values, or where one of them is undefined."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def names_of_metrics(labels: Sequence[Label]) -> dict[str, bool]:
    """Return the metrics that training can be steered by, and whether the higher one is the better; gauc takes a group
    column."""
    names = {"auc": True, "logloss": False} if any(not label.is_number for label in labels) else {}
    for answer in answers_of(labels):
        of_label = {"mse": False, "mae": False} if answer.label.is_number else {"auc": True, "logloss": False}
        if not answer.label.is_number:
            of_label |= {"normalized_entropy": False, "gauc": True}
        names |= {answer.key(name): higher for name, higher in of_label.items()}
    return names


def by_answer(labels: Sequence[Label], metrics: Mapping[str, float | None]) -> dict[str, dict[str, float | None]]:
    """Return the metrics of each answer by its name, of what `TaskMetrics.compute` gives; empty for a single label."""
    names = [] if is_single(labels) else [answer.name for answer in answers_of(labels)]
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in metrics.items() if key.startswith(f"{name}.")}
        for name in names
    }


def scored_rows(labels: Sequence[Label], metrics: Mapping[str, float | None]) -> dict[str, int]:
    """Return how many rows of positive weight each answer has by its name, "" of a single label."""
    named: dict[str, Mapping[str, float | None]] = {**by_answer(labels, metrics)} or {"": metrics}
    return {name: rows_of(one) for name, one in named.items()}


def in_words(labels: Sequence[Label], metrics: Mapping[str, float | None]) -> str:
    """Return the metrics in one line for a log, label by label where there are several."""
    if is_single(labels):
        return _line(metrics)
    lines = {name: _line(one) for name, one in by_answer(labels, metrics).items()}
    return " · ".join(f"{name} {line}" for name, line in lines.items() if line)


def _line(metrics: Mapping[str, float | None]) -> str:
    names = ("auc", "gauc", "logloss", "normalized_entropy", "calibration", "mse", "mae")
    parts = [f"{name} {shown(metrics[name])}" for name in names if name in metrics]
    return " · ".join(parts)


def shown(value: float | None) -> str:
    """Return a metric as a log line has it."""
    return "undefined" if value is None else f"{value:.4f}"
