"""Define the keys of conf/daily. Their meaning is explained there."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.embedding.errors import ConfigError

GUARDED = ("auc", "logloss", "normalized_entropy", "calibration")
METHODS = ("incremental", "window", "stale")


@dataclass
class DailyBandsConfig:
    window: int = 7
    min_days: int = 3
    auc: float | None = 0.05
    logloss: float | None = 0.15
    normalized_entropy: float | None = 0.1
    calibration: float | None = 0.3


@dataclass
class DailyConfig:
    """conf/daily/*.yaml, for scripts/daily.py alone."""

    first: str | None = None
    last: str | None = None
    period_hours: int | None = None
    epochs: int = 1
    method: str = "incremental"
    window_days: int = 7
    stale_after: int = 7
    replay_rows: int | None = None
    accept: list[str] = field(default_factory=list)
    skip: list[str] = field(default_factory=list)
    rollback_to: str | None = None
    keep_days: int = 7
    full_every: int = 7
    publish_to: str | None = None
    report: bool = True
    watch: bool = False
    marker: str | None = "_SUCCESS"
    poll_seconds: float = 60.0
    wait_seconds: float | None = None
    bands: DailyBandsConfig = field(default_factory=DailyBandsConfig)


def check_daily(daily: DailyConfig) -> None:
    """Raises ConfigError: naming the key, what was found and what is expected."""
    at_least = {
        "period_hours": (daily.period_hours, 1),
        "epochs": (daily.epochs, 1),
        "window_days": (daily.window_days, 1),
        "stale_after": (daily.stale_after, 1),
        "keep_days": (daily.keep_days, 1),
        "replay_rows": (daily.replay_rows, 1),
        "full_every": (daily.full_every, 1),
        "bands.window": (daily.bands.window, 0),
        "bands.min_days": (daily.bands.min_days, 1),
    }
    for key, (value, least) in at_least.items():
        if value is not None and value < least:
            raise ConfigError(f"daily.{key} is {value}; expected at least {least}")
    above_zero = {"poll_seconds": daily.poll_seconds, "wait_seconds": daily.wait_seconds}
    above_zero |= {f"bands.{key}": getattr(daily.bands, key) for key in GUARDED}
    for key, number in above_zero.items():
        if number is not None and not number > 0:
            raise ConfigError(f"daily.{key} is {number}; expected a number above 0")
    if daily.method not in METHODS:
        raise ConfigError(f"daily.method is {daily.method!r}; expected {', '.join(METHODS[:-1])} or {METHODS[-1]}")
