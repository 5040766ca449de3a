"""Intervals of a difference: the closed forms against their definitions, the bootstrap against the closed forms."""

import numpy as np
import pytest

from tessera.ctr.data.counter_random import key
from tessera.ctr.metrics import exact
from tessera.ctr.metrics.compare import (
    PairedRows,
    _SortedClasses,
    _times,
    auc_difference,
    logloss_difference,
    paired_bootstrap,
    row_loss,
)


def paired(seed: int, rows: int, noise=(0.5, 0.6), digits: int | None = None, weight=None, cluster=None) -> PairedRows:
    """Two models of one truth, each with noise of its own and some in common; `digits` makes ties."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(-1, 1.2, rows)
    common = generator.normal(0, 0.4, rows)
    positive = generator.random(rows) < 1 / (1 + np.exp(-truth))
    models = [1 / (1 + np.exp(-(truth + common + one * generator.normal(0, 1, rows)))) for one in noise]
    models = [one if digits is None else np.round(one, digits) for one in models]
    return PairedRows(*models, positive, weight, cluster)


@pytest.mark.parametrize("digits", [None, 1])
def test_delongs_variance_is_that_of_his_paper(digits):
    """The kernel of every pair of a positive and a negative, as the paper writes it: no sorting."""
    rows = paired(0, 157, digits=digits)
    placements = {True: [], False: []}
    for prediction in (rows.first, rows.second):
        a, b = prediction[rows.positive][:, None], prediction[~rows.positive][None, :]
        kernel = (a > b) + 0.5 * (a == b)
        placements[True].append(kernel.mean(1))
        placements[False].append(kernel.mean(0))
    covariance = sum(np.cov(placements[side]) / len(placements[side][0]) for side in (True, False))
    variance = np.array([-1, 1]) @ covariance @ np.array([-1, 1])
    found = auc_difference(rows)
    assert found.standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert found.first == pytest.approx(exact.auc(rows.first, rows.positive), rel=1e-12)
    assert found.second == pytest.approx(exact.auc(rows.second, rows.positive), rel=1e-12)
    assert found.low == pytest.approx(found.value - 1.959964 * found.standard_error, rel=1e-5)


def test_the_loss_interval_is_that_of_paired_differences():
    rows = paired(1, 500)
    losses = [row_loss(one, rows.positive) for one in (rows.first, rows.second)]
    difference = losses[1] - losses[0]
    found = logloss_difference(rows)
    assert found.value == pytest.approx(difference.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / np.sqrt(500), rel=1e-9)
    assert found.first == pytest.approx(exact.logloss(rows.first, rows.positive), rel=1e-9)


WEIGHT = np.random.default_rng(5).integers(1, 4, 3000).astype(np.float32)
CLUSTER = np.repeat(np.arange(600), 5)


@pytest.mark.parametrize("digits", [None, 2])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("cluster", [None, CLUSTER], ids=["rows", "clusters"])
def test_the_bootstrap_and_the_closed_forms_agree(digits, weight, cluster):
    rows = paired(2, 3000, digits=digits, weight=weight, cluster=cluster)
    drawn = paired_bootstrap(rows, 1500, seed=3)
    for name, closed in (("auc", auc_difference(rows)), ("logloss", logloss_difference(rows))):
        spread = drawn[name].std(ddof=1)
        assert spread == pytest.approx(closed.standard_error, rel=0.08), name  # 4 standard errors of a spread of 1500
        assert drawn[name].mean() == pytest.approx(closed.value, abs=5 * spread / np.sqrt(1500)), name
        ends = np.quantile(drawn[name], [0.025, 0.975])
        assert ends == pytest.approx([closed.low, closed.high], abs=0.25 * spread), name


def test_a_replicate_is_the_metric_of_rows_repeated():
    """The AUC of sorted classes under integer weights is the offline AUC with those weights, ties and all."""
    rows = paired(4, 400, digits=1)
    times = _times(400, key(1))
    assert 0.8 < times.mean() < 1.2 and times.max() <= 9
    for prediction in (rows.first, rows.second):
        expected = exact.auc(prediction, rows.positive, times.astype(float))
        model = _SortedClasses.of(prediction, rows.positive)
        assert model.auc(times) == pytest.approx(expected, rel=1e-12)
        assert model.auc(times * np.float64(0.5)) == pytest.approx(expected, rel=1e-12)


def test_rows_are_taken_as_often_as_poisson_says():
    times = _times(1_000_003, key(2))
    assert len(times) == 1_000_003
    expected = np.exp(-1) / np.array([1, 1, 2, 6, 24, 120])
    np.testing.assert_allclose(np.bincount(times, minlength=6)[:6] / len(times), expected, atol=2e-3)
    assert abs(np.corrcoef(times[1:], times[:-1])[0, 1]) < 5e-3


def test_a_replicate_depends_on_seed_and_number_alone():
    rows = paired(6, 300)
    ten, five, other = (paired_bootstrap(rows, n, seed) for n, seed in ((10, 0), (5, 0), (5, 1)))
    for name in ten:
        np.testing.assert_array_equal(ten[name][:5], five[name])
        assert not (five[name] == other[name]).any() and len(set(ten[name])) == 10


def test_rows_of_a_cluster_that_are_alike_count_as_one():
    """Every row twice adds nothing if the two are a cluster, and halves the variance if they are not."""
    once = paired(7, 800)
    repeated = [np.repeat(one, 2) for one in (once.first, once.second, once.positive)]
    as_clusters = PairedRows(*repeated, cluster=np.repeat(np.arange(800) * 17 - 5, 2))
    for function in (auc_difference, logloss_difference):
        alone, clustered, loose = (function(one) for one in (once, as_clusters, PairedRows(*repeated)))
        assert clustered.value == pytest.approx(alone.value, rel=1e-9)
        assert clustered.standard_error == pytest.approx(alone.standard_error, rel=2e-3)
        assert loose.standard_error == pytest.approx(alone.standard_error / np.sqrt(2), rel=2e-3)


def test_of_two_equal_models_one_in_twenty_seems_different():
    models = [paired(seed, 300, noise=(0.5, 0.5)) for seed in range(100, 500)]
    wrong = [[function(rows).p_value < 0.05 for function in (auc_difference, logloss_difference)] for rows in models]
    share = np.mean(wrong, axis=0)
    assert (share > 0.025).all() and (share < 0.08).all()  # 0.05 with a standard deviation of 0.011


def test_one_model_against_itself():
    rows = paired(8, 100)
    rows = PairedRows(rows.first, rows.first, rows.positive)
    for function in (auc_difference, logloss_difference):
        found = function(rows)
        assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert all(not drawn.any() for drawn in paired_bootstrap(rows, 5).values())


def test_one_class_and_no_rows():
    rows = paired(9, 50)
    one = PairedRows(rows.first, rows.second, np.zeros(50, bool))
    assert auc_difference(one) is None and logloss_difference(one) is not None
    drawn = paired_bootstrap(one, 4)
    assert np.isnan(drawn["auc"]).all() and np.isfinite(drawn["logloss"]).all()
    none = PairedRows(*(np.zeros(0), np.zeros(0), np.zeros(0, bool)))
    assert auc_difference(none) is None and logloss_difference(none) is None
    assert np.isnan(paired_bootstrap(none, 4)["auc"]).all()
