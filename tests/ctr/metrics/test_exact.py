"""The exact metrics against scikit-learn, torchrec, loops over pairs and groups, and closed forms."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchrec.metrics.calibration import compute_calibration, get_calibration_states
from torchrec.metrics.gauc import compute_window_auc, get_auc_states
from torchrec.metrics.ne import compute_ne, get_ne_states

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics import exact
from tessera.ctr.metrics.score_table import check_rows, cumsum_runs, score_table

METRICS = (
    "auc",
    "logloss",
    "normalized_entropy",
    "calibration",
    "pr_auc",
    "expected_calibration_error",
    "observed_rate",
)


def rows(seed, count=3000, ties=False, weighted=True, dtype=np.float32):
    generator = np.random.default_rng(seed)
    logit = generator.normal(-2, 1.5, count)
    if ties:
        logit = np.round(logit)
    prediction = (1 / (1 + np.exp(-logit))).astype(dtype)
    label = (generator.random(count) < prediction).astype(np.float32)
    weight = generator.choice([0.25, 1.0, 3.5], count).astype(np.float32) if weighted else None
    group = generator.integers(-40, 40, count) * (1 << 55)
    return prediction, label, weight, group


CASES = [
    pytest.param(dict(seed=seed, ties=ties, weighted=weighted, dtype=dtype), id=f"{ties=}-{weighted=}-{dtype.__name__}")
    for seed, (ties, weighted, dtype) in enumerate(
        (ties, weighted, dtype)
        for ties in (False, True)
        for weighted in (False, True)
        for dtype in (np.float32, np.float64)
    )
]


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_scikit_learn(case):
    prediction, label, weight, _ = rows(**case)
    given = dict(sample_weight=weight)
    assert exact.auc(prediction, label, weight) == pytest.approx(
        sk.roc_auc_score(label, prediction, **given), rel=1e-12
    )
    expected = sk.average_precision_score(label, prediction, **given)
    assert exact.pr_auc(prediction, label, weight) == pytest.approx(expected, rel=1e-12)
    expected = sk.log_loss(label, prediction.astype(np.float64), **given)
    assert exact.logloss(prediction, label, weight) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torchrec(case):
    prediction, label, weight, _ = rows(**case)
    weights = np.ones_like(label) if weight is None else weight
    tensors = [torch.from_numpy(column.astype(np.float64))[None] for column in (label, prediction, weights)]
    states = get_ne_states(*tensors, eta=1e-12)
    expected = compute_ne(*states.values(), eta=1e-12).item()
    assert exact.normalized_entropy(prediction, label, weight) == pytest.approx(expected, rel=1e-12)
    expected = compute_calibration(*get_calibration_states(*tensors).values()).item()
    assert exact.calibration(prediction, label, weight) == pytest.approx(expected, rel=1e-12)


def test_mean_group_auc_agrees_with_torchrec():
    # torchrec gives no half for ties and skips groups of one single prediction, so: distinct predictions.
    prediction, label, weight, group = rows(3)
    assert len(np.unique(np.stack([prediction, group]), axis=1).T) == len(group)
    order = np.argsort(group, kind="stable")
    lengths = torch.from_numpy(np.unique(group, return_counts=True)[1])
    states = get_auc_states(*(torch.from_numpy(c[order])[None] for c in (label, prediction, weight)), lengths)
    theirs = compute_window_auc(states["auc_sum"], states["num_samples"])
    ours = exact.group_auc(check_rows(prediction, label, weight, group))
    assert ours.mean_auc == pytest.approx(theirs["gauc"].item(), rel=1e-6)
    assert ours.scored_groups == theirs["num_samples"].item()


@pytest.mark.parametrize("case", CASES)
def test_gauc_agrees_with_a_loop_over_groups(case):
    prediction, label, weight, group = rows(**case, count=400)
    weights = np.ones(len(label)) if weight is None else weight
    aucs, sizes, counts = [], [], []
    for one in np.unique(group):
        inside = group == one
        if 0 < label[inside].sum() < inside.sum():
            aucs.append(sk.roc_auc_score(label[inside], prediction[inside], sample_weight=weights[inside]))
            sizes.append(weights[inside].sum())
            counts.append(inside.sum())
    found = exact.group_auc(check_rows(prediction, label, weight, group))
    assert found.gauc == pytest.approx(np.average(aucs, weights=sizes), rel=1e-12)
    assert found.gauc == exact.gauc(prediction, label, group, weight)
    assert found.mean_auc == pytest.approx(np.mean(aucs), rel=1e-12)
    assert (found.groups, found.scored_groups) == (len(np.unique(group)), len(aucs))
    assert found.scored_rows == sum(counts)


@pytest.mark.parametrize("spread", [(-3, 9), (-20, 20), (0, 0)])
def test_gauc_of_weights_far_apart_against_fractions(spread):
    """A group of small weights behind one of large weights keeps all its digits."""
    generator = np.random.default_rng(sum(spread))
    prediction = np.round(generator.random(600), 2).astype(np.float32)
    label, group = (generator.random(600) < 0.4).astype(np.float32), np.sort(generator.integers(0, 30, 600))
    scale = np.linspace(spread[1], spread[0], 30)[group]  # light groups come last
    weight = (10.0**scale * generator.uniform(0.5, 2, 600)).astype(np.float32)
    aucs, sizes = [], []
    for one in range(30):
        rows = [
            (float(p), y == 1, Fraction(float(w)))
            for p, y, w, g in zip(prediction, label, weight, group, strict=True)
            if g == one
        ]
        positives, negatives = ([row for row in rows if row[1] == kind] for kind in (True, False))
        if positives and negatives:
            won = sum(
                a[2] * b[2] * (1 if a[0] > b[0] else Fraction(1, 2) if a[0] == b[0] else 0)
                for a in positives
                for b in negatives
            )
            aucs.append(won / (sum(a[2] for a in positives) * sum(b[2] for b in negatives)))
            sizes.append(sum(row[2] for row in rows))
    expected = sum(auc * size for auc, size in zip(aucs, sizes, strict=True)) / sum(sizes)
    found = exact.group_auc(check_rows(prediction, label, weight, group))
    assert found.gauc == pytest.approx(float(expected), rel=1e-13)
    assert found.mean_auc == pytest.approx(float(sum(aucs) / len(aucs)), rel=1e-13)


@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1], [5, 1, 7, 2, 64, 3]])
def test_running_sums_begin_anew_with_each_run(lengths):
    values = np.random.default_rng(1).random(sum(lengths))
    starts = np.cumsum([0, *lengths])[: len(lengths)]
    expected = [np.cumsum(part) for part in np.split(values, starts[1:])] if lengths else [values]
    np.testing.assert_allclose(cumsum_runs(values, starts), np.concatenate(expected), rtol=1e-14)


def test_gauc_takes_string_groups():
    assert exact.gauc([0.1, 0.9, 0.8, 0.2], [0, 1, 0, 1], np.array(["a", "a", "b", "b"])) == 0.5


def test_ties_count_half_by_a_loop_over_pairs():
    prediction, label, weight, _ = rows(5, count=200, ties=True)
    positive, negative = np.flatnonzero(label), np.flatnonzero(label == 0)
    won = (prediction[positive][:, None] > prediction[negative]) + 0.5 * (
        prediction[positive][:, None] == prediction[negative]
    )
    pairs = weight[positive][:, None].astype(np.float64) * weight[negative]
    assert exact.auc(prediction, label, weight) == pytest.approx((won * pairs).sum() / pairs.sum(), rel=1e-12)


def test_integer_weights_are_repeated_rows():
    prediction, label, _, group = rows(6, count=500)
    times = np.random.default_rng(6).integers(0, 4, 500)
    repeated = [np.repeat(column, times) for column in (prediction, label, group)]
    weighted = exact.evaluate_predictions(prediction, label, times.astype(np.float32), group)
    plain = exact.evaluate_predictions(repeated[0], repeated[1], None, repeated[2])
    for name in (*METRICS, "gauc"):
        assert weighted[name] == pytest.approx(plain[name], rel=1e-12), name
    assert weighted["rows"] == (times > 0).sum() and weighted["positives"] == ((times > 0) & (label == 1)).sum()


def test_the_order_of_rows_does_not_matter():
    columns = rows(7, ties=True)
    shuffled = np.random.default_rng(7).permutation(len(columns[0]))
    first, second = (
        exact.evaluate_predictions(*columns),
        exact.evaluate_predictions(*(c[shuffled] for c in columns)),
    )
    for name in (*METRICS, "gauc"):
        assert first[name] == pytest.approx(second[name], rel=1e-12), name


def test_rows_of_weight_zero_change_nothing():
    prediction, label, weight, group = rows(8)
    padded = [np.concatenate([column, column[:100]]) for column in (prediction, 1 - label, weight, group)]
    padded[1][:-100] = label
    padded[2][-100:] = 0
    assert exact.evaluate_predictions(*padded) == exact.evaluate_predictions(prediction, label, weight, group)


def test_perfect_and_constant_predictions():
    label = np.array([0, 0, 0, 1])
    assert exact.auc(label.astype(np.float32), label) == 1 == exact.pr_auc(label.astype(np.float32), label)
    assert exact.auc(1.0 - label, label) == 0
    constant = np.full(4, 0.25)
    assert exact.auc(constant, label) == 0.5
    assert exact.normalized_entropy(constant, label) == pytest.approx(1, rel=1e-12)
    assert exact.calibration(constant, label) == 1
    assert exact.expected_calibration_error(constant, label) == 0
    assert exact.pr_auc(constant, label) == 0.25


def test_a_saturated_prediction_costs_the_clip():
    assert exact.logloss(np.float32([0]), [1]) == pytest.approx(-np.log(1e-7), rel=1e-12)
    assert exact.logloss(np.float32([1]), [0]) == pytest.approx(-np.log(1e-7), rel=1e-9)
    assert exact.logloss(np.float32([1]), [1]) == pytest.approx(1e-7, rel=1e-6)


def test_expected_calibration_error_by_a_loop_over_bins():
    prediction, label, _, _ = rows(9, count=2000, weighted=False, dtype=np.float64)
    parts = np.array_split(np.argsort(prediction), 20)
    gaps = [abs(prediction[part].mean() - label[part].astype(np.float64).mean()) for part in parts]
    assert exact.expected_calibration_error(prediction, label) == pytest.approx(np.mean(gaps), rel=1e-12)


def test_calibration_bins_hold_every_row_once_and_part_no_tie():
    prediction, label, weight, _ = rows(10, ties=True)
    bins = score_table(check_rows(prediction, label, weight)).calibration_bins(8)
    assert bins.rows.sum() == len(label) and bins.weight.sum() == pytest.approx(weight.sum(dtype=np.float64))
    assert (np.diff(bins.mean_prediction) > 0).all() and len(bins.rows) <= 8
    assert (bins.observed * bins.weight).sum() == pytest.approx((label * weight).sum(dtype=np.float64))


@pytest.mark.parametrize("label, defined", [(1, {"logloss", "calibration"}), (0, {"logloss"})])
def test_one_class_is_undefined_not_a_number_made_up(label, defined):
    result = exact.evaluate_predictions(np.float32([0.2, 0.6]), [label] * 2, None, [1, 1])
    defined = defined | {"expected_calibration_error", "observed_rate"}
    for name in METRICS:
        assert (result[name] is not None) == (name in defined), name
    assert result["gauc"] is None and result["groups"]["scored"] == 0 and result["groups"]["total"] == 1
    assert result["undefined"]["auc"] == ("no negatives" if label else "no positives")
    assert result["undefined"]["gauc"] == "no group with both classes"
    assert (result["rows"], result["positives"]) == (2, 2 * label)


@pytest.mark.parametrize("weight", [None, []])
def test_no_rows(weight):
    empty = np.zeros(0, np.float32)
    result = exact.evaluate_predictions(empty, empty, weight, np.zeros(0, np.int64))
    assert all(result[name] is None for name in (*METRICS, "gauc"))
    assert result["rows"] == 0 and set(result["undefined"]) == {*METRICS, "gauc"}
    assert result["undefined"]["logloss"] == "no rows of positive weight"
    assert exact.evaluate_predictions([0.5], [1], [0.0])["logloss"] is None


def test_without_groups():
    result = exact.evaluate_predictions([0.2, 0.4], [0, 1])
    assert result["undefined"] == {"gauc": "no group column"} and result["groups"] is None


@pytest.mark.parametrize(
    "columns, message",
    [
        (([0.1, np.nan], [0, 1]), "prediction: row 1 has nan (1 such rows); expected a number"),
        (([0.1, np.inf], [0, 1]), "prediction: row 1 has inf"),
        (([0.1, 0.2], [0, 7]), "label: row 1 has 7 (1 such rows); expected 0 or 1"),
        (([0.1, 0.2], [0, 1], [1, -2.0]), "weight: row 1 has -2; expected 0 or more"),
        (([0.1, 0.2], [0, 1, 1]), r"label: found shape (3,); expected (2,)"),
        (([0.1, 1.5], [0, 1]), "expected probabilities in [0, 1]"),
    ],
)
def test_a_wrong_value_is_named(columns, message):
    with pytest.raises(DataError) as caught:
        exact.logloss(*columns)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_large_finite_values_are_no_error():
    assert exact.auc(np.array([1e308, 1.5e308, -1e308]), [1, 0, 0]) == 0.5


@pytest.mark.slow
def test_forty_million_rows_fit_in_memory():
    import subprocess
    import sys

    script = """
import resource
import numpy as np
from tessera.ctr.metrics.exact import evaluate_predictions
generator = np.random.default_rng(0)
rows = 40_000_000
prediction = generator.random(rows, dtype=np.float32)
label = (generator.random(rows, dtype=np.float32) < prediction).astype(np.float32)
weight = generator.random(rows, dtype=np.float32)
group = generator.integers(0, rows // 30, rows)
result = evaluate_predictions(prediction, label, weight, group)
assert abs(result["auc"] - 5 / 6) < 1e-3, result
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4, "GiB"
