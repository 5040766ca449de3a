"""Read the metric by which training is steered: one, or a sum of several with factors, as `auc-0.5*logloss`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from tessera.ctr.data.labels import Label
from tessera.ctr.metrics.tasks import names_of_metrics

FACTOR = re.compile(r"(?P<sign>[+-]?)(?:(?P<number>\d+(?:\.\d+)?)\*)?")


def terms_of(name: str, known: Collection[str]) -> list[tuple[float, str]]:
    """Return factors and metrics of a sum. Names of metrics may hold any letters, as those of labels do.

    Raises ValueError: it is no sum of known metrics.
    """
    found: list[tuple[float, str]] = []
    rest = name
    while rest or not found:
        factor = FACTOR.match(rest)
        assert factor is not None  # it may be empty
        rest = rest[factor.end() :]
        fits = [one for one in known if rest.startswith(one) and rest[len(one) :][:1] in ("", "+", "-")]
        if not fits or (found and not factor["sign"]):
            raise ValueError(f"{name!r} is no sum of metrics")
        metric = max(fits, key=len)
        found.append((float(f"{factor['sign']}{factor['number'] or 1}"), metric))
        rest = rest[len(metric) :]
    return found


def higher_is_better(labels: Sequence[Label], name: str) -> bool:
    """Return whether more of a metric, or of a sum of them, is better.

    Raises ValueError, one sentence: it is no such, or more of it is better by one term and worse by another.
    """
    known = names_of_metrics(labels)
    better = [(factor > 0) == known[metric] for factor, metric in terms_of(name, known) if factor]
    if not better or len(set(better)) > 1:
        raise ValueError(f"{name!r} rewards what is good by one term and what is bad by another")
    return better[0]


def is_gauc(metric: str) -> bool:
    """Return whether a metric is that of groups, of one label or of the only one."""
    return metric.rpartition(".")[2] == "gauc"


def steering_value(metrics: Mapping[str, float | None], name: str) -> float | None:
    """Return the value of a metric or of a sum; None where a metric of it is undefined."""
    total = 0.0
    for factor, metric in terms_of(name, metrics):
        value = metrics[metric]
        if value is None:
            return None
        total += factor * value
    return total
