"""Distinct ids of fewer rows follow from a sample; those of more are guessed without leaps."""

from __future__ import annotations

import numpy as np
import pytest

from tessera.ctr.plan.spectrum import Spectrum, spectrum_of


def drawn(rows: int, seed: int = 0, ids: int = 20_000) -> np.ndarray:
    chances = 1 / np.arange(1, ids + 1)
    return np.random.default_rng(seed).choice(ids, size=rows, p=chances / chances.sum())


def spectrum(ids: np.ndarray) -> Spectrum:
    return spectrum_of(len(ids), [np.unique(ids, return_counts=True)[1]])


def test_fewer_rows_hold_as_many_as_are_drawn_from_the_sample():
    ids, draw = drawn(4096), np.random.default_rng(1)
    known = spectrum(ids)
    for rows in (1, 16, 200, 3000):
        found = [len(np.unique(draw.choice(ids, rows, replace=False))) for _ in range(400)]
        assert known.distinct(rows) == pytest.approx(np.mean(found), rel=0.01)
    assert known.distinct(4096) == known.total == len(np.unique(ids))
    assert known.distinct(0) == pytest.approx(0, abs=1e-6)


def test_frequent_ids_are_put_together_at_little_loss():
    times = np.arange(1, 2000)
    known = spectrum_of(4096, [times])
    every = Spectrum(4096, {float(one): 1.0 for one in times})
    assert len(known.ids) < 60 and known.total == pytest.approx(every.total)
    for rows in (1, 10, 100, 1000):
        assert known.distinct(rows) == pytest.approx(every.distinct(rows), rel=0.003)


def test_a_mean_over_batches_is_that_of_their_distinct_ids():
    batches = [drawn(512, seed) for seed in range(4)]
    known = spectrum_of(512, [np.unique(ids, return_counts=True)[1] for ids in batches])
    assert known.total == pytest.approx(np.mean([len(np.unique(ids)) for ids in batches]))


@pytest.mark.parametrize(("ids", "rel"), [(20_000, 0.25), (2_000_000, 0.1)])
def test_more_rows_are_a_guess_that_is_not_far_off(ids, rel):
    every = drawn(65_536, 2, ids)
    known = spectrum(every[:8192])
    for rows in (16_384, 65_536):
        assert known.distinct(rows) == pytest.approx(len(np.unique(every[:rows])), rel=rel)


def test_a_sample_of_all_ids_stays_and_one_of_new_ids_grows_with_the_rows():
    assert Spectrum(100, {100.0: 7.0}).distinct(10_000) == pytest.approx(7)
    assert Spectrum(100, {1.0: 100.0}).distinct(10_000) == pytest.approx(10_000)
    assert Spectrum(100, {}).distinct(10) == Spectrum(100, {}).distinct(1000) == 0
