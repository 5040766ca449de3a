"""Bands of the guard, by hand."""

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.daily.bands import out_of_band
from tessera.ctr.daily.config import DailyBandsConfig
from tessera.embedding.errors import ConfigError

CONFIG = DailyBandsConfig(window=3, min_days=2, auc=0.1, logloss=0.2, normalized_entropy=None, calibration=0.5)


def day(auc=0.8, logloss=0.5, calibration=1.0) -> dict:
    return {"auc": auc, "logloss": logloss, "normalized_entropy": 0.9, "calibration": calibration}


def test_inside_the_bands():
    before = [day(auc=0.7), day(auc=0.9)]  # mean 0.8, at least 0.72
    assert out_of_band(CONFIG, day(auc=0.73), before) is None
    assert out_of_band(CONFIG, day(auc=0.99, logloss=0.1), before) is None  # better is no reason


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (day(auc=0.71), "auc is 0.7100, expected at least 0.7200 (mean 0.8000 of 2 days)"),
        (day(auc=None), "auc is undefined, expected at least 0.7200 (mean 0.8000 of 2 days)"),
        (day(logloss=0.61), "logloss is 0.6100, expected at most 0.6000 (mean 0.5000 of 2 days)"),
        (day(calibration=1.6),
         "calibration is 1.6000, expected at least 0.5000 and at most 1.5000 (mean 1.0000 of 2 days)"),
        (day(calibration=0.4),
         "calibration is 0.4000, expected at least 0.5000 and at most 1.5000 (mean 1.0000 of 2 days)"),
    ],
)  # fmt: skip
def test_what_is_out_is_named(metrics, sentence):
    assert out_of_band(CONFIG, metrics, [day(auc=0.7), day(auc=0.9)]) == sentence


def test_a_label_that_is_a_number_has_a_band_of_its_error():
    before = [
        {**day(), "tasks": {"click": day(), "minutes": {"rows": 9, "mse": mse, "mae": 1.0}}} for mse in (3.0, 5.0)
    ]
    of = lambda mse: {**day(), "tasks": {"click": day(), "minutes": {"rows": 9, "mse": mse, "mae": 9.0}}}  # noqa: E731
    assert out_of_band(CONFIG, of(5.1), before) is None  # mean 4, at most 5.2
    assert (
        out_of_band(CONFIG, of(5.3), before) == "minutes.mse is 5.3000, expected at most 5.2000 (mean 4.0000 of 2 days)"
    )
    assert out_of_band(CONFIG, of(None), before).startswith("minutes.mse is undefined, expected at most 5.2000")
    assert out_of_band(CONFIG, of(5.3), [{**day(), "tasks": {"click": day()}}] * 3) is None  # no record of it


def test_the_window():
    falling = [day(auc=0.2), day(auc=0.8), day(auc=0.8), day(auc=0.8)]
    assert out_of_band(CONFIG, day(auc=0.6), falling)  # the first is forgotten
    assert out_of_band(CONFIG, day(auc=0.6), falling[:2]) is None
    assert out_of_band(CONFIG, day(auc=0.1), [day()]) is None  # too few days
    assert out_of_band(CONFIG, day(auc=0.1), [day(auc=None), day()]) is None
    off = DailyBandsConfig(window=0, min_days=1, auc=0.1, logloss=None, normalized_entropy=None, calibration=None)
    assert out_of_band(off, day(auc=0.1), [day()] * 5) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("daily.bands.min_days=0", "daily.bands.min_days is 0; expected at least 1"),
        ("daily.bands.auc=-0.1", "daily.bands.auc is -0.1; expected a number above 0"),
        ("daily.method=batch", "daily.method is 'batch'; expected incremental, window or stale"),
        ("daily.keep_days=0", "daily.keep_days is 0; expected at least 1"),
    ],
)
def test_mistakes_in_the_configuration(override, message):
    with pytest.raises(ConfigError) as error:
        load_config([override], "")
    assert str(error.value) == message
