"""Name the folders of days and hours, and resolve lists and ranges of days to them.

A day is known by its key, 2026-11-01, and an hour by 2026-11-01T05, however its folder is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from tessera.ctr.data.errors import DataError
from tessera.embedding.errors import ConfigError
from tessera.embedding.settings import setting

KEY = re.compile(r"\d{4}-\d\d-\d\d(T\d\d)?")
HOUR = "hour"
RANGE = ".."
DIGITS = {"%Y": 4, "%m": 2, "%d": 2, "%H": 2}
PLACE = {"%Y": "YYYY", "%m": "MM", "%d": "DD", "%H": "HH"}
DIRECTIVE = re.compile(r"(%.)")
DATE_LIKE = re.compile(r"(?:(\w+)=)?(\d{4}-\d\d?-\d\d?|\d{8})")


@dataclass
class PartitionConfig:
    """Keys of data.partition: the names of day folders."""

    name: str | None = setting("day", "day=2026-11-01; null or empty: the folder is called 2026-11-01")
    format: str = setting("%Y-%m-%d", "of %Y, %m, %d and, where a folder is an hour, %H; with / for folders in folders")


@dataclass(frozen=True)
class DayFolders:
    """The names of folders of days: `name=` and a date. An hour is part of the date, or a folder hour=05 in the day's.

    Raises ConfigError: a format that does not tell one day from another.
    """

    name: str | None = "day"
    format: str = "%Y-%m-%d"

    def __post_init__(self) -> None:
        if "%" in (self.name or ""):
            raise ConfigError(
                f"data.partition.name is {self.name!r}; expected a name alone, or null: dates are data.partition.format"
            )
        found = [part for part in DIRECTIVE.findall(self.format) if part != "%%"]
        if sorted(found) not in (["%Y", "%d", "%m"], ["%H", "%Y", "%d", "%m"]) or "" in self.pattern.split("/"):
            raise ConfigError(
                f"data.partition.format is {self.format!r}; expected %Y, %m and %d once each, and %H where a folder is "
                "an hour, as in %Y-%m-%d or year=%Y/month=%m/day=%d"
            )

    @classmethod
    def of(cls, config: PartitionConfig) -> DayFolders:
        return cls(config.name or None, config.format)

    @property
    def pattern(self) -> str:
        return f"{self.name}={self.format}" if self.name else self.format

    @property
    def depth(self) -> int:
        """Number of folder levels from the data set's root to a day."""
        return self.pattern.count("/") + 1

    @property
    def has_hours(self) -> bool:
        """True if the folder name includes the hour."""
        return "%H" in self.format

    def __str__(self) -> str:
        """Return the form that messages use for such a folder: day=YYYY-MM-DD."""
        return DIRECTIVE.sub(lambda found: PLACE.get(found[1], "%"), self.pattern)

    @cached_property
    def _expressions(self) -> list[re.Pattern]:
        return [_expression(level) for level in self.pattern.split("/")]

    def values_of(self, level: int, folder: str) -> dict[str, str] | None:
        """Return the date parts in a folder name at the given level of the path to a day; None if it does not match."""
        match = self._expressions[level].fullmatch(unquote(folder))
        return match.groupdict() if match else None

    def key_of(self, folders: list[str]) -> str | None:
        """Return the key of the folders from the root to a day; None if their names do not match or hold no valid
        date."""
        if len(folders) != self.depth:
            return None
        values: dict[str, str] = {}
        for level, folder in enumerate(folders):
            found = self.values_of(level, folder)
            if found is None:
                return None
            values |= found
        time = _time(values)
        return None if time is None else time.strftime("%Y-%m-%dT%H" if self.has_hours else "%Y-%m-%d")

    def folder_of(self, key: str) -> str:
        """Return the folder name of a key, with leading zeros."""
        folder = time_of(key).strftime(self.pattern)
        return f"{folder}/{HOUR}={key[11:]}" if "T" in key and not self.has_hours else folder

    def find(self, folders: list[str]) -> tuple[int, str] | None:
        """Find the last day among the folders on the way to a file: return how many folders come before it, and the key
        of the day or of the hour in it. None if no folder is a day.

        Raises DataError: a folder of hours in it is no hour.
        """
        for begin in range(len(folders) - self.depth, -1, -1):
            key = self.key_of(folders[begin : begin + self.depth])
            if key is not None:
                behind = folders[begin + self.depth :]
                hour = hour_of(behind[0]) if behind and not self.has_hours else None
                return begin, key if hour is None else f"{key}T{hour}"
        return None

    def hint(self, folders: Iterable[str]) -> str:
        """Return the end of a message if folders may be days under another name: the keys that would say so."""
        for folder in folders:
            match = DATE_LIKE.fullmatch(folder)
            if match and self.key_of([folder]) is None:
                form = "%Y-%m-%d" if "-" in match[2] else "%Y%m%d"
                name = f"data.partition.name={match[1] or ''} " if match[1] != self.name else ""
                return f"found {folder}: {name}data.partition.format={form} reads such folders"
        return "data.partition says how they are called"


def _expression(level: str) -> re.Pattern:
    """Return the regular expression of a folder. A number may lack its leading zeros where no digit can follow it."""
    parts = DIRECTIVE.split(unquote(level))
    made = ""
    for i, part in enumerate(parts):
        if part not in DIGITS:
            made += re.escape("%" if part == "%%" else part)
            continue
        before, behind = parts[i - 1], parts[i + 1]
        alone = (before != "" or i == 1) and (behind != "" or i == len(parts) - 2)
        digits = DIGITS[part]
        made += f"(?P<{part[1]}>\\d{{{1 if alone and digits == 2 else digits},{digits}}})"
    return re.compile(made, re.ASCII)


def _time(values: dict[str, str]) -> datetime | None:
    try:
        year, month, day = (int(values[one]) for one in "Ymd")
        return datetime(year, month, day, int(values.get("H", 0)))
    except ValueError:
        return None


def hour_of(folder: str) -> str | None:
    """Return 05 for the folders hour=5 and hour=05, and None for any other name.

    Raises DataError: hour= and something that is no hour.
    """
    name, equals, value = folder.partition("=")
    if name != HOUR or not equals:
        return None
    if not re.fullmatch(r"\d{1,2}", value, re.ASCII) or int(value) > 23:
        raise DataError(f"{folder} is no hour: expected {HOUR}=00 to {HOUR}=23; move its files to their hours")
    return f"{int(value):02d}"


def time_of(key: str) -> datetime:
    return datetime.strptime(key, "%Y-%m-%dT%H" if "T" in key else "%Y-%m-%d")


def check_key(key: str, name: str) -> str:
    """Raise ConfigError, naming the configuration's key, for a value that is neither a date nor an hour."""
    try:
        if KEY.fullmatch(key) and time_of(key):
            return key
    except ValueError:
        pass
    raise ConfigError(f"{name} is {key!r}; expected a day as 2026-01-31 or an hour as 2026-01-31T05")


def is_inside(key: str, first: str | None, last: str | None) -> bool:
    """Return whether a key lies between `first` and `last`; a day counts as inside if any of its hours may be."""
    after = first is None or key >= first[: len(key)]
    return after and (last is None or key[: len(last)] <= last)


def days_of(value: Any, name: str, folders: DayFolders) -> list[str] | None:
    """Return the keys that a configuration lists: days, hours and ranges 2026-11-01..2026-11-06, both ends included.

    Days may also be written as their folders are (20261101). Raises ConfigError, naming the configuration's key.
    """
    if value is None:
        return None
    keys: list[str] = []
    for one in value if isinstance(value, (list, tuple)) else [value]:
        ends = str(one).split(RANGE)
        if len(ends) > 2:
            raise ConfigError(f"{name} has {one!r}; expected a day, or a range as 2026-01-01{RANGE}2026-01-31")
        first, last = (_key(end, name, folders) for end in (ends[0], ends[-1]))
        if len(first) != len(last) or first > last:
            raise ConfigError(f"{name} has {one!r}; expected a range from an earlier day to a later one")
        step = timedelta(hours=1) if "T" in first else timedelta(days=1)
        time, end = time_of(first), time_of(last)
        while time <= end:
            keys.append(time.strftime("%Y-%m-%dT%H" if "T" in first else "%Y-%m-%d"))
            time += step
    if not keys:
        raise ConfigError(f"{name} is empty; expected days, or null for all")
    return keys


def _key(value: str, name: str, folders: DayFolders) -> str:
    value = value.strip()
    as_folder = folders.key_of((f"{folders.name}={value}" if folders.name else value).split("/"))
    return as_folder if as_folder and not KEY.fullmatch(value) else check_key(value, name)
