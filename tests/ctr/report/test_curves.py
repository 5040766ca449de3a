"""The drawn points: ends, number, and closeness to the full curves."""

import numpy as np
import pytest
from sklearn import metrics as sk

from tessera.ctr.metrics.score_table import check_rows, score_table
from tessera.ctr.report.curves import (
    POINTS,
    Curve,
    histogram,
    pr_curve,
    roc_curve,
    thin_pr,
    thin_roc,
    thin_series,
    wilson_interval,
)
from tests.ctr.report.run_folder import columns


@pytest.fixture(params=[2, 7, 300, 20000])
def rows(request):
    values = columns(request.param, request.param)
    values["label"][:2] = [0, 1]
    return check_rows(values["prediction"], values["label"])


def test_full_curves_agree_with_scikit_learn(rows):
    table = score_table(rows)
    false, true, _ = sk.roc_curve(rows.positive, rows.prediction, drop_intermediate=False)
    np.testing.assert_allclose(roc_curve(table).x, false, rtol=1e-12)
    np.testing.assert_allclose(roc_curve(table).y, true, rtol=1e-12)
    precision, recall, _ = sk.precision_recall_curve(rows.positive, rows.prediction)
    np.testing.assert_allclose(pr_curve(table).x, recall[-2::-1], rtol=1e-12)
    np.testing.assert_allclose(pr_curve(table).y, precision[-2::-1], rtol=1e-12)


def test_thinned_curves_keep_their_ends_and_area(rows):
    table = score_table(rows)
    full = roc_curve(table)
    thin = thin_roc(full)
    assert len(thin.x) <= POINTS and (thin.x[0], thin.y[0], thin.x[-1], thin.y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(thin.y, thin.x) == pytest.approx(table.auc(), abs=2e-3)
    full = pr_curve(table)
    thin = thin_pr(full)
    assert len(thin.x) <= POINTS and thin.x[-1] == 1 and thin.y[0] == full.y[0]
    assert set(zip(thin.x, thin.y, strict=True)) <= set(zip(full.x, full.y, strict=True))


def test_values_at_a_rate_are_points_of_the_curve():
    curve = Curve(np.array([0, 0.1, 0.1, 0.6, 1]), np.array([0, 0.2, 0.5, 0.9, 1]))
    np.testing.assert_array_equal(curve.last_within(np.array([0, 0.1, 0.5, 1])), [0, 0.5, 0.5, 1])
    np.testing.assert_array_equal(curve.first_reaching(np.array([0, 0.1, 0.5, 1])), [0, 0.2, 0.9, 1])


def test_a_long_series_becomes_means_and_a_short_one_stays():
    x, y = np.arange(12345.0), np.sin(np.arange(12345) / 900)
    thin = thin_series(x, y)
    assert len(thin.x) == POINTS and np.abs(thin.y - np.sin(thin.x / 900)).max() < 1e-3
    assert np.average(thin.y, weights=np.diff(np.arange(POINTS + 1) * 12345 // POINTS)) == pytest.approx(y.mean())
    gaps = thin_series(x[:5], np.array([1, np.nan, 2, np.inf, 3]))
    assert gaps.x.tolist() == [0, 2, 4] and gaps.y.tolist() == [1, 2, 3]


def test_wilson_interval_against_its_defining_equation(rows):
    bins = score_table(rows).calibration_bins()
    for end in wilson_interval(bins):
        # Its ends are the rates from which the observed one is 1.96 standard errors away.
        inside = (end > 0) & (end < 1)
        distance = (bins.observed - end) ** 2 * bins.rows
        np.testing.assert_allclose(distance[inside], (1.96**2 * end * (1 - end))[inside], atol=1e-9)


def test_histogram_holds_every_row(rows):
    table = score_table(rows)
    edges = np.linspace(table.score[0], table.score[-1], 11)
    negative, positive = histogram(table, edges)
    assert positive.sum() == rows.positive.sum() and negative.sum() == (~rows.positive).sum()
