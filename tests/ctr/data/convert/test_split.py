import datetime

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.convert.split import HourCounts, by_day, by_fraction, by_time, seconds_of
from tessera.ctr.data.errors import DataError
from tessera.embedding.errors import ConfigError


def test_fractions_are_met_and_depend_on_the_key_alone():
    keys = np.arange(200_000, dtype=np.int64)
    assign = by_fraction(0.2, 0.1, seed=1)
    folders, index = assign(None, keys)
    assert folders == ["train", "valid", "test"]
    shares = np.bincount(index) / len(index)
    # five standard deviations of a binomial share
    assert np.abs(shares - [0.7, 0.2, 0.1]).max() < 5 * 0.5 / len(keys) ** 0.5
    order = np.random.default_rng(0).permutation(len(keys))
    np.testing.assert_array_equal(assign(None, keys[order])[1], index[order])
    other = by_fraction(0.2, 0.1, seed=2)(None, keys)[1]
    assert 0.4 < (other == index).mean() < 0.7  # independent: 0.49 + 0.04 + 0.01 = 0.54


def test_splits_by_time_and_day():
    table = pa.table({"t": pa.array([-1, 0, 86399, 86400, 200_000])})
    folders, index = by_time("t", 0, 86400)(table, None)
    assert [folders[i] for i in index] == ["train", "valid", "valid", "test", "test"]
    folders, index = by_day("t")(table, None)
    days = ["day=1969-12-31", "day=1970-01-01", "day=1970-01-01", "day=1970-01-02", "day=1970-01-03"]
    assert [folders[i] for i in index] == days


def test_hours_cut_off_the_last_fractions():
    seconds = np.random.default_rng(0).integers(0, 1000 * 3600, 100_000)
    counts = HourCounts({})
    for part in np.array_split(seconds, 7):
        counts.add(part)
    valid_from, test_from = counts.cuts(0.2, 0.1)
    assert valid_from % 3600 == 0 and test_from % 3600 == 0
    assert abs((seconds >= test_from).mean() - 0.1) < 0.001
    assert abs((seconds >= valid_from).mean() - 0.3) < 0.001
    with pytest.raises(DataError, match="no rows with a time"):
        HourCounts({}).cuts(0.1, 0.1)


def test_impossible_splits_are_refused():
    for valid, test in ((-0.1, 0.1), (0.5, 0.5), (float("nan"), 0.1)):
        with pytest.raises(ConfigError, match="fractions: found"):
            by_fraction(valid, test, 0)
    with pytest.raises(ConfigError, match="valid_from: found 2, expected at most test_from, which is 1"):
        by_time("t", 2, 1)


def test_times_in_words():
    moment = datetime.datetime(2014, 10, 26, 6, tzinfo=datetime.timezone.utc)
    assert seconds_of("2014-10-26T06:00:00") == int(moment.timestamp()) == seconds_of(str(int(moment.timestamp())))
    assert seconds_of("2014-10-26") == int(moment.timestamp()) - 6 * 3600
    with pytest.raises(ConfigError, match="found 'yesterday'"):
        seconds_of("yesterday")
