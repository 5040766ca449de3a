"""Check whether a day's numbers are like those of the days before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tessera.ctr.daily.config import DailyBandsConfig

#: metric -> which way is out of the band. A better model is no reason to hold a day; calibration is best at 1.
WORSE = {"auc": (-1,), "logloss": (1,), "normalized_entropy": (1,), "calibration": (-1, 1), "mse": (1,)}


def out_of_band(config: DailyBandsConfig, metrics: Mapping, before: Sequence[Mapping]) -> str | None:
    """Return a sentence that names metric, value and band of what is out of its band; None if nothing is.

    The band of a metric is mean * (1 - allowed) to mean * (1 + allowed), the mean over the last `window` days in which
    it is defined; only the worse side counts for all but calibration. With fewer than `min_days` such days there is no
    band. An undefined metric is out of its band.

    With several labels each has its bands; a label that is a number has one, of its mse.

    metrics: of the day. before: those of the trained days before it, in order.
    """
    if "tasks" not in metrics:
        return _out_of_band(config, metrics, before, "")
    problems = []
    for task, of_task in metrics["tasks"].items():
        earlier = [one["tasks"][task] for one in before if task in one.get("tasks", {})]
        problems.append(_out_of_band(config, of_task, earlier, f"{task}."))
    return "; ".join(filter(None, problems)) or None


def _out_of_band(config: DailyBandsConfig, metrics: Mapping, before: Sequence[Mapping], prefix: str) -> str | None:
    problems = []
    for name, sides in WORSE.items():
        allowed = getattr(config, name)
        recent = before[-config.window :] if config.window else []
        known = [one[name] for one in recent if one.get(name) is not None]
        if name not in metrics or allowed is None or len(known) < config.min_days:
            continue
        mean, value = sum(known) / len(known), metrics[name]
        bounds = [mean * (1 + side * allowed) for side in sides]
        outside = value is None or any((value - bound) * side > 0 for bound, side in zip(bounds, sides, strict=True))
        if outside:
            shown = "undefined" if value is None else f"{value:.4f}"
            words = " and ".join(
                f"{'at least' if side < 0 else 'at most'} {bound:.4f}"
                for bound, side in zip(bounds, sides, strict=True)
            )
            problems.append(f"{prefix}{name} is {shown}, expected {words} (mean {mean:.4f} of {len(known)} days)")
    return "; ".join(problems) or None
