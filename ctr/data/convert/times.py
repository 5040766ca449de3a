"""Parse text to seconds since 1970, UTC. A date that does not exist is refused: 2026-02-30 is not the second of
March."""

from __future__ import annotations

import datetime
import re
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.times import FEWEST, TimeRule

PER_SECOND = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}
#: Short forms that arrow knows and Python does not.
SHORT_FORMS = {"%T": "%H:%M:%S", "%R": "%H:%M", "%D": "%m/%d/%y", "%F": "%Y-%m-%d", "%e": "%d", "%h": "%b"}


def seconds_of_numbers(source: pa.Array, unit: str) -> tuple[pa.Array, np.ndarray]:
    """Convert float64 numbers in `unit` to whole seconds: int64 [n] with nulls, and bool [n] that marks invalid
    times."""
    null = source.is_null().to_numpy(zero_copy_only=False)
    seconds = np.floor(source.fill_null(0).to_numpy(zero_copy_only=False) / PER_SECOND[unit])
    wrong = ~(np.abs(seconds) < 2.0**62)
    return pa.array(np.where(wrong, 0, seconds).astype(np.int64), mask=null), wrong


def seconds_of_text(source: pa.Array, pattern: str) -> tuple[pa.Array, np.ndarray]:
    """Parse text by a strptime pattern to seconds: int64 [n] with nulls, and bool [n] that marks invalid times.

    Arrow reads it fast, and takes days beyond the end of a month, seconds beyond 59 and days of the year for something
    else. So what it does not write back as it was is read again by Python, which refuses what does not exist.
    """
    for short, long in SHORT_FORMS.items():
        pattern = pattern.replace(short, long)
    times = pc.strptime(source, format=pattern, unit="s", error_is_null=True)
    seconds, null = times.cast(pa.int64()), source.is_null().to_numpy(zero_copy_only=False)
    wrong = times.is_null().to_numpy(zero_copy_only=False) & ~null
    if not _python_reads(pattern):
        return seconds, wrong
    same = pc.equal(_plain(pc.strftime(times, format=pattern)), _plain(source)).fill_null(fill_value=True)
    doubtful = np.flatnonzero(~same.to_numpy(zero_copy_only=False))
    if len(doubtful):
        values = seconds.fill_null(0).to_numpy(zero_copy_only=False).copy()
        encoded = source.take(pa.array(doubtful)).dictionary_encode()
        read = [_by_python(text, pattern) for text in encoded.dictionary.to_pylist()]
        known = np.array([one is not None for one in read])
        exact = np.array([one or 0 for one in read])
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        values[doubtful], wrong[doubtful] = exact[codes], ~known[codes]
        seconds = pa.array(values, mask=null | wrong)
    return seconds, wrong


def implausible(seconds: pa.Array, rule: TimeRule) -> np.ndarray:
    """Return bool [n] that marks times outside the plausible range."""
    known = seconds.is_valid().to_numpy(zero_copy_only=False)
    return rule.outside(seconds.fill_null(rule.first).to_numpy(zero_copy_only=False)) & known


def unit_advice(number: float, rule: TimeRule) -> str:
    """Return the end of a message about an implausible number: the unit in which it would be plausible; empty if there
    is none."""
    fits = [unit for unit, per_second in PER_SECOND.items() if rule.first <= number // per_second < rule.stop]
    return f"; as {fits[0]} it would be plausible (format: {fits[0]})" if fits else ""


def refuse_unit(source: pa.Array, outside: np.ndarray, rule: TimeRule, unit: str, where: str) -> None:
    """Raise SchemaError, whatever the policy about bad rows, if most numbers are implausible in their unit and would
    not be in another."""
    known = len(source) - source.null_count
    if known < FEWEST or 2 * int(outside.sum()) <= known:
        return
    found = source.filter(pa.array(outside)).to_numpy(zero_copy_only=False)
    advice = unit_advice(float(np.median(found)), rule)
    if advice:
        raise SchemaError(f"{where}: expected {rule.range} as {unit}, found {found[0]:.0f}{advice}")


def _plain(text: pa.Array) -> pa.Array:
    """Remove what does not distinguish times: leading zeros, upper case, spaces around."""
    text = pc.replace_substring_regex(pc.utf8_lower(text), r"(^|[^0-9])[0 ]+([0-9])", r"\1\2")
    return pc.utf8_trim_whitespace(text)


@cache
def _python_reads(pattern: str) -> bool:
    try:
        datetime.datetime.strptime("", pattern)
    except ValueError as error:
        return "directive" not in str(error) and "stray" not in str(error)
    return True


def _by_python(text: str, pattern: str) -> int | None:
    """Return seconds, or None for an invalid time. The short forms of `pattern` are written out."""
    try:
        time = datetime.datetime.strptime(text.strip(), pattern)
    except ValueError:
        return None
    if "%z" not in pattern and _numbers(time.strftime(pattern)) != _numbers(text):
        return None  # the day 366 of a year that has 365
    time = time if time.tzinfo else time.replace(tzinfo=datetime.timezone.utc)
    return int((time - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)).total_seconds() // 1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]+", text)]
