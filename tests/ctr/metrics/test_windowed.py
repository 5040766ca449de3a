"""Rates of rows while they are trained, and GAUC over ranks, against torchrec's and scikit-learn's definitions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchrec.metrics.ne import NEMetricComputation

from tessera.ctr.data.labels import Label
from tessera.ctr.metrics.exact import gauc
from tessera.ctr.metrics.grouped import StreamingGauc
from tessera.ctr.metrics.windowed import KEPT, WindowedRates
from tests.ranks import on_ranks

CLICK, BUY = Label("click"), Label("buy", parent=0)


def batch_of(seed: int, rows: int = 50, labels: int = 1) -> tuple[torch.Tensor, SimpleNamespace]:
    draw = torch.Generator().manual_seed(seed)
    value = (torch.rand(rows, labels, generator=draw) < 0.3).float()
    weight = torch.rand(rows, generator=draw) * (torch.rand(rows, generator=draw) < 0.8)
    logits = torch.randn(rows, labels, generator=draw)
    return logits[:, 0] if labels == 1 else logits, SimpleNamespace(labels=value, known=None, weight=weight)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_normalized_entropy_and_calibration_are_torchrecs(shift):
    rates = WindowedRates([CLICK], shift, "cpu")
    batches = [batch_of(seed) for seed in range(KEPT + 3)]  # sums are made on the way, and at the end
    for logits, batch in batches:
        rates.add(logits, batch)
    p, y, w = (
        torch.cat([one.double() for one in parts])
        for parts in zip(
            *((torch.sigmoid(z.double() + shift), b.labels[:, 0], b.weight) for z, b in batches), strict=True
        )
    )
    rates.make_sums()
    found = rates.take()
    ne = NEMetricComputation(0, 1, 1, 100)  # rank, batch, tasks, window
    ne.update(predictions=p[None], labels=y[None], weights=w[None])
    assert found["normalized_entropy"] == pytest.approx(float(ne._compute()[0].value), rel=1e-9)
    assert found["calibration"] == pytest.approx(float((p * w).sum() / (y * w).sum()), rel=1e-9)
    rates.make_sums()
    assert rates.take() == {"normalized_entropy": None, "calibration": None}, "a new window without rows"


def test_labels_count_where_they_are_known():
    rates = WindowedRates([CLICK, BUY], 0.0, "cpu")
    logits, batch = batch_of(3, labels=2)
    rates.add(logits, batch)
    rates.make_sums()
    found = rates.take()
    assert set(found) >= {"click.calibration", "buy.calibration", "buy.normalized_entropy"}
    counted = (batch.weight > 0) & (batch.labels[:, 0] == 1)
    p, y, w = (
        one[counted].double() for one in (torch.sigmoid(logits[:, 1].double()), batch.labels[:, 1], batch.weight)
    )
    assert found["buy.calibration"] == pytest.approx(float((p * w).sum() / (y * w).sum()))


def rows_of(seed: int, rows: int):
    draw = np.random.default_rng(seed)
    return (
        draw.normal(size=rows).round(1),
        draw.integers(0, 2, rows),
        draw.choice([0.0, 1.0, 2.5], rows),
        draw.integers(0, 9, rows),
    )


def streamed(process, shares: list[int]) -> float | None:
    """GAUC of rows that are dealt to ranks: this rank has the share from its begin on."""
    columns, metric = rows_of(0, 300), StreamingGauc()
    begin = sum(shares[: process.rank])
    for first in range(begin, begin + shares[process.rank], 40):
        part = slice(first, min(first + 40, begin + shares[process.rank]))
        logit, label, weight, group = (torch.from_numpy(one[part]) for one in columns)
        metric.update(logit, label, weight, group)
    return metric.compute()


def test_gauc_is_that_of_the_report_and_of_scikit_learn():
    logit, label, weight, group = rows_of(0, 300)
    score = torch.sigmoid(torch.from_numpy(logit).float()).numpy()
    found = streamed(SimpleNamespace(rank=0), [300])
    assert found == pytest.approx(gauc(score, label, group, weight), rel=1e-12)
    aucs, weights = [], []
    for one in np.unique(group):
        own = (group == one) & (weight > 0)
        aucs.append(roc_auc_score(label[own], score[own], sample_weight=weight[own]))
        weights.append(weight[own].sum())
    assert found == pytest.approx(np.average(aucs, weights=weights))
    assert StreamingGauc().compute() is None


@pytest.mark.slow
def test_gauc_of_ranks_is_that_of_one():
    (whole,) = on_ranks(1, streamed, [300])
    assert on_ranks(2, streamed, [300, 0]) == pytest.approx([whole] * 2, rel=1e-12)
    assert on_ranks(3, streamed, [13, 200, 87]) == pytest.approx([whole] * 3, rel=1e-12)
