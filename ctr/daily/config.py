"""Define the keys of `daily`: their types, defaults, meaning, and which values each one takes."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.ctr.serving.error_memory import MemorySettings
from tessera.embedding.settings import section, setting


@dataclass
class DailyBandsConfig:
    window: int = setting(7, "trained days whose mean the bands refer to; 0: no guard", at_least=0)
    min_days: int = setting(
        3, "days in the window before the guard acts; the first day, of a new model, does not count", at_least=1
    )
    auc: float | None = setting(0.05, "allowed share below the mean; null: AUC is not guarded", above=0)
    logloss: float | None = setting(0.15, "allowed share above the mean", above=0)
    normalized_entropy: float | None = setting(0.1, "allowed share above the mean", above=0)
    calibration: float | None = setting(0.3, "allowed share above or below the mean", above=0)
    mse: float | None = setting(0.3, "allowed share above the mean, of a label that is a number", above=0)


@dataclass
class DailyMemoryConfig(MemorySettings):
    enabled: bool = setting(False, "also score each day corrected by an error memory of the model (ReLoop2)")
    delay_seconds: int = setting(600, "from a row's time until its label is known", at_least=0)
    block_seconds: int = setting(300, "rows of so long a time are read before any of them is written", at_least=1)
    block_rows: int = setting(10_000, "and so many of them at most", at_least=1)


@dataclass
class DailyConfig:
    """Retraining day after day (docs/daily.md), on partitions day=YYYY-MM-DD or
    day=YYYY-MM-DD/hour=HH directly below data.path."""

    first: str | None = setting(
        None, "first partition, 2026-01-01 or 2026-01-01T05; also daily.from; null: the first one found"
    )
    last: str | None = setting(None, "last one, inclusive; also daily.to; null: the last one found")
    period_hours: int | None = setting(
        None,
        "from one partition to the next; null: 24, or 1 where days have hours; 168: a folder a week",
        at_least=1,
    )
    epochs: int = setting(1, "passes over the rows of a partition", at_least=1)
    method: str = setting(
        "incremental",
        "incremental: go on with the model | window: from nothing on the last window_days partitions | "
        "stale: do not train behind the first stale_after partitions",
        choices=("incremental", "window", "stale"),
    )
    window_days: int = setting(7, "method window: partitions that are trained each time", at_least=1)
    stale_after: int = setting(7, "method stale: partitions that are trained", at_least=1)
    replay_rows: int | None = setting(
        None, "rows of all trained partitions that are trained again with each one; null: none", at_least=1
    )
    accept: list[str] = setting([], "partitions to train although the guard would hold them")
    skip: list[str] = setting([], "partitions to pass over for good: held ones, late ones, missing ones")
    rollback_to: str | None = setting(
        None, "go back to the end of this partition: the published model and the state; then leave"
    )
    keep_days: int = setting(7, "partitions whose states are kept for rollback_to", at_least=1)
    full_every: int = setting(
        7, "every so many partitions a whole model is published, between them changes; 1: always whole", at_least=1
    )
    publish_to: str | None = setting(
        None, "folder or URI that models are published in; null: published/ in the run folder"
    )
    report: bool = setting(True, "write report.html of each partition into its folder")
    watch: bool = setting(False, "wait for partitions to come, until `last`")
    marker: str | None = setting(
        "_SUCCESS", "the file that says that a partition is complete, where others have one; null: none does"
    )
    poll_seconds: float = setting(60.0, "watch: time between two looks", above=0)
    wait_seconds: float | None = setting(
        None, "watch: leave when the next partition has not come in so long; null: wait for ever", above=0
    )
    bands: DailyBandsConfig = section(
        DailyBandsConfig, "a day whose progressive metrics leave their bands is not trained and not published"
    )
    memory: DailyMemoryConfig = section(
        DailyMemoryConfig, "an error memory beside the model that each day is evaluated with"
    )
