"""Differences seed by seed, their interval, and what they say about a claim."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

#: 97.5 % quantile of Student's t by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Paired(NamedTuple):
    """mean of the differences, half of their 95 % interval (Student's t; NaN for one seed), and each."""

    mean: float
    half: float
    each: tuple[float, ...]


def paired(better: Sequence[float], worse: Sequence[float]) -> Paired:
    """Return `better` minus `worse`, run by run: runs at the same place have the same seed. Raises ValueError: not as
    many of one as of the other, or none."""
    each = tuple(a - b for a, b in zip(better, worse, strict=True))
    if not each:
        raise ValueError("no runs to compare, expected at least one of each side")
    half = float("nan")
    if len(each) > 1:
        half = STUDENT.get(len(each) - 1, 2.0) * statistics.stdev(each) / len(each) ** 0.5
    return Paired(statistics.fmean(each), half, each)


def verdict(found: Paired, margin: float | None = None) -> str:
    """Return whether the difference is above 0, or with `margin` whether it is not below -margin: `holds` if the whole
    interval is so, `in every seed` if each difference is but the interval is not, `the other way` if the whole interval
    says the opposite, and otherwise `not told apart`, or with `margin` and a mean inside of it `on the mean`."""
    least = 0.0 if margin is None else -margin
    if found.mean - found.half > least:
        return "holds"
    if min(found.each) > least:
        return "in every seed"
    if found.mean + found.half < least:
        return "the other way"
    if margin is not None and found.mean > least:
        return "on the mean"
    return "not told apart"


def written(found: Paired, digits: int = 4) -> str:
    """Return mean ± half of the interval, and the difference of each seed in brackets."""
    each = ", ".join(f"{one:+.{digits}f}" for one in found.each)
    return f"{found.mean:+.{digits}f} ± {found.half:.{digits}f} ({each})"
