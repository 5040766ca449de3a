"""The streaming metrics against the exact ones, over batches, padding and ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics import exact
from tessera.ctr.metrics.streaming import StreamingMetrics, logit_keys
from tessera.distributed.rank import Process
from tests.ranks import on_ranks


def batches(seed, sizes=(1000, 0, 1, 777), weighted=True, loc=-2.0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        logit = torch.randn(size, generator=generator) * scale + loc
        label = (torch.rand(size, generator=generator) < torch.sigmoid(logit)).float()
        weight = torch.rand(size, generator=generator) * 2 if weighted else None
        made.append((logit, label, weight))
    return made


def join(made):
    columns = list(zip(*made, strict=True))
    return [None if column[0] is None else torch.cat(column) for column in columns]


def feed(metrics, made):
    for batch in made:
        metrics.update(*batch)
    return metrics


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bins", [16, 1000, 1 << 16])
def test_auc_is_within_its_own_bound_of_exact(bins, weighted):
    made = batches(bins + weighted, weighted=weighted)
    logit, label, weight = join(made)
    result = feed(StreamingMetrics(bins), made).compute()
    weight = None if weight is None else weight.numpy()
    expected = exact.auc(logit.numpy(), label.numpy(), weight)
    assert abs(result["auc"] - expected) <= result["auc_error_bound"] + 1e-12
    if bins == 1 << 16:
        assert result["auc_error_bound"] < 1e-3


def test_default_bins_state_a_small_bound_on_many_rows():
    made = batches(11, sizes=(200_000,))
    assert feed(StreamingMetrics(), made).compute()["auc_error_bound"] < 1e-4


def test_the_bound_is_reached():
    # Both rows share the only bin: AUC may be 0 or 1; the histogram says one half, give or take one half.
    metrics = StreamingMetrics(bins=1)
    metrics.update(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    result = metrics.compute()
    assert (result["auc"], result["auc_error_bound"]) == (0.5, 0.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_agree_with_the_exact_metrics(weighted):
    made = batches(2, weighted=weighted)
    logit, label, weight = join(made)
    result = feed(StreamingMetrics(), made).compute()
    prediction = torch.sigmoid(logit.double()).numpy()
    expected = exact.evaluate_predictions(prediction, label.numpy(), None if weight is None else weight.numpy())
    for name in ("logloss", "normalized_entropy", "calibration"):
        assert result[name] == pytest.approx(expected[name], rel=1e-12), name
    assert (result["rows"], result["positives"]) == (expected["rows"], expected["positives"])


def test_the_cut_into_batches_does_not_matter():
    made = batches(3)
    whole = StreamingMetrics()
    whole.update(*join(made))
    first, second = feed(StreamingMetrics(), made).compute(), whole.compute()
    assert first == pytest.approx(second, rel=1e-12)


def test_padding_changes_nothing_whatever_it_holds():
    made = batches(4)
    plain = feed(StreamingMetrics(), made)
    padded = StreamingMetrics()
    junk = torch.tensor([float("nan"), float("inf"), 99.0, -99.0])
    for logit, label, weight in made:
        padded.update(torch.cat([logit, junk]), torch.cat([label, junk]), torch.cat([weight, torch.zeros(4)]))
    assert torch.equal(plain._state, padded._state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_is_an_error(value):
    metrics = StreamingMetrics()
    metrics.update(torch.tensor([0.5, value]), torch.tensor([1.0, 0.0]))
    with pytest.raises(DataError, match="1 rows have a logit or label that is not finite"):
        metrics.compute()


def test_empty_and_single_class():
    empty = StreamingMetrics()
    empty.update(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    result = empty.compute()
    assert result["rows"] == 0 and all(result[name] is None for name in ("auc", "auc_error_bound", "logloss"))
    one_class = StreamingMetrics()
    one_class.update(torch.zeros(3), torch.zeros(3))
    result = one_class.compute()
    assert result["auc"] is None and result["calibration"] is None and result["normalized_entropy"] is None
    assert result["logloss"] == pytest.approx(np.log(2))


def test_extreme_and_half_precision_logits():
    logit = torch.tensor([-1e30, -20.0, 20.0, 1e30])
    label = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for dtype in (torch.float32, torch.bfloat16):
        metrics = StreamingMetrics()
        metrics.update(logit.to(dtype), label)
        result = metrics.compute()
        # The clip of the probability costs 1e-7 where a row is right beyond doubt.
        assert (result["auc"], result["auc_error_bound"]) == (1, 0) and result["logloss"] == pytest.approx(
            1e-7, rel=1e-6
        )


def test_reset_starts_anew_and_misuse_is_caught():
    made = batches(5)
    metrics = feed(StreamingMetrics(), made)
    metrics.all_reduce()
    with pytest.raises(AssertionError, match="reset"):
        metrics.update(*made[0])
    with pytest.raises(AssertionError, match="reset"):
        metrics.all_reduce()
    first = metrics.compute()
    metrics.reset()
    assert feed(metrics, made).compute() == first


def exact_auc(logit, label, weight=None):
    return exact.auc(logit.double().numpy(), label.numpy(), None if weight is None else weight.numpy())


WIDE = {
    "logits of 20 times the usual size": lambda normal: 20 * normal,
    "a quarter beyond 16": lambda normal: 14 * normal - 2,
    "as good as infinite": lambda normal: torch.where(normal.abs() > 1.5, 1e4 * normal.sign(), normal),
    "one row far out": lambda normal: torch.cat([normal[1:], torch.tensor([1e30])]),
    "a tiny spread around 1000": lambda normal: 1000 + 1e-3 * normal,
    "a tiny spread around -3": lambda normal: -3 + 1e-5 * normal,
    "all equal": lambda normal: torch.full_like(normal, 0.3),
    "two values": lambda normal: torch.where(normal > 0.3, 40.0, -40.0),
    "around zero": lambda normal: 1e-20 * normal,
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("made", WIDE.values(), ids=WIDE)
def test_the_bound_holds_whatever_the_logits_are(made, weighted):
    generator = torch.Generator().manual_seed(9)
    normal = torch.randn(20_000, generator=generator)
    logit = made(normal)
    label = (torch.rand(len(normal), generator=generator) < torch.sigmoid(normal)).float()
    weight = torch.rand(len(normal), generator=generator) * 3 if weighted else None
    metrics = StreamingMetrics()
    for at in (slice(0, 3), slice(3, 15_000), slice(15_000, None)):
        metrics.update(logit[at], label[at], None if weight is None else weight[at])
    result, expected = metrics.compute(), exact_auc(logit, label, weight)
    assert abs(result["auc"] - expected) <= result["auc_error_bound"] + 1e-12
    # Wide logits are told apart as well as others; where no bound can be small, few numbers are there to tell apart.
    assert abs(result["auc"] - expected) < 1e-5 or len(logit.unique()) == 1 or logit.abs().max() < 1e-16


def test_logits_beyond_16_are_ranked_as_offline():
    # As many rows beyond 16 as in the run that showed it: an early stop must not be steered by another AUC.
    generator = torch.Generator().manual_seed(3)
    logit = 17 * torch.randn(50_000, generator=generator)
    label = (torch.rand(len(logit), generator=generator) < torch.sigmoid(logit / 8)).float()
    assert (logit.abs() > 16).float().mean() > 0.278
    metrics = StreamingMetrics()
    metrics.update(logit, label)
    result = metrics.compute()
    assert result["auc"] == pytest.approx(exact_auc(logit, label), abs=1e-6) and result["auc_error_bound"] < 1e-4


@pytest.mark.parametrize("scale", [1.0, 12.0, 60.0])
def test_logloss_is_clipped_as_offline(scale):
    generator = torch.Generator().manual_seed(4)
    logit = scale * torch.randn(5_000, generator=generator).double()
    label = (torch.rand(5_000, generator=generator) < 0.4).float()
    metrics = StreamingMetrics()
    metrics.update(logit, label)
    expected = exact.evaluate_predictions(torch.sigmoid(logit).numpy(), label.numpy())
    for name in ("logloss", "normalized_entropy", "calibration"):
        assert metrics.compute()[name] == pytest.approx(expected[name], rel=1e-8), name


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=2, max_size=40),
    bins=st.sampled_from([1, 2, 7, 64]),
    seed=st.integers(0, 1 << 16),
)
def test_any_logits_in_any_order_give_the_same_histogram_within_its_bound(logits, bins, seed):
    generator = torch.Generator().manual_seed(seed)
    logit = torch.tensor(logits)
    label = (torch.rand(len(logits), generator=generator) < 0.5).float()
    label[:2] = torch.tensor([0.0, 1.0])
    weight = torch.randint(1, 9, (len(logits),), generator=generator).double()
    whole, parts = StreamingMetrics(bins), StreamingMetrics(bins)
    whole.update(logit, label, weight)
    order = torch.randperm(len(logits), generator=generator)
    for one in order.chunk(5):
        parts.update(logit[one], label[one], weight[one])
    assert torch.equal(whole._state[: 2 * bins], parts._state[: 2 * bins])
    result = whole.compute()
    assert abs(result["auc"] - exact_auc(logit, label, weight)) <= result["auc_error_bound"] + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_are_in_the_order_of_the_logits(dtype):
    limits = torch.finfo(dtype)
    logit = torch.tensor([limits.min, -1e30, -16, -1, -1e-3, 0, 1e-3, 0.5, 15.9, 16, 1e4, limits.max], dtype=dtype)
    keys = logit_keys(logit.double())
    assert (keys.diff() > 0).all() and keys.abs().max() < 1 << 62
    assert logit_keys(torch.tensor([0.0, -0.0], dtype=torch.float64)).tolist() == [0, 0]


def ranks_batches():
    """Some wide and some narrow: the ranks' histograms are of other widths until they meet."""
    return [one for scale in (1.5, 30.0, 0.01) for one in batches(6, sizes=(500, 0, 777), scale=scale)]


def _rank(process: Process) -> dict:
    # The second rank also sees an empty batch; the ranks need not take the same number of steps.
    metrics = feed(StreamingMetrics(), ranks_batches()[process.rank :: process.world_size])
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    metrics.all_reduce(dist.group.WORLD)
    dist.all_reduce = original
    return {"result": metrics.compute(), "collectives": len(calls)}


@pytest.mark.parametrize("world", [2, 3])
def test_many_ranks_equal_one(world):
    ranks = on_ranks(world, _rank)
    alone = feed(StreamingMetrics(), ranks_batches()).compute()
    assert all(one == ranks[0] for one in ranks) and ranks[0]["collectives"] == 2
    assert ranks[0]["result"] == pytest.approx(alone, rel=1e-12)


def test_one_process_without_a_group():
    metrics = feed(StreamingMetrics().to("cpu"), batches(7))
    before = metrics._state.clone()
    metrics.all_reduce(None)
    assert torch.equal(before, metrics._state)


def test_update_does_not_wait_for_the_device():
    # On the meta device any read of a value raises: what passes there never needed one.
    metrics = StreamingMetrics(64, device="meta")
    metrics.update(*(torch.zeros(5, device="meta") for _ in range(3)))
