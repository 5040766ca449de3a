"""Match rows that two runs scored, whatever files, ranks and order each wrote them in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics.compare import PairedRows
from tessera.ctr.metrics.score_table import Rows
from tessera.ctr.report.predictions import PREFERRED_SPLITS, read_column, split_names
from tessera.ctr.report.result import PREDICTIONS, TASKS, answer_folder, settle_result

ROW = "row"


@dataclass(frozen=True)
class Scored:
    """One part of what is compared: a split, or a day. `rows` are in the order in which the data set stores them."""

    name: str
    rows: PairedRows
    group: np.ndarray | None


def read_pairs(first: Path, second: Path, split: str | None, label: str = "") -> tuple[list[Scored], list[str]]:
    """Return the rows that two run folders both scored: of one split, or (daily retraining) of all days in common.

    split: None takes test, valid or train, the first that both have. label: which of several. Returns the parts, and a
    sentence for each reason for which something was left out.

    Raises:
        DataError: one folder is of daily retraining and the other is not, there is nothing in common, or the rows are
            not the same; one line that names the folders and what differs.
    """
    for folder in (first, second):
        settle_result(folder)
    daily = [(folder / "days.jsonl").is_file() for folder in (first, second)]
    if daily[0] != daily[1]:
        having, lacking = (first, second) if daily[0] else (second, first)
        raise DataError(f"{having} is a folder of daily retraining and {lacking} is not; expected two of a kind")
    if not daily[0]:
        return [_pair(_place(first, label), _place(second, label), split, None)], []
    inside = _place(Path(), label).as_posix()
    days = [
        {path.relative_to(folder).parts[1] for path in folder.glob(f"days/*/{inside}")} for folder in (first, second)
    ]
    common = sorted(days[0] & days[1])
    if not common:
        counts = [f"{folder} has {len(one)} scored days" for folder, one in zip((first, second), days, strict=True)]
        raise DataError(f"{' and '.join(counts)}, none of them in common")
    ours, theirs = first / "days", second / "days"
    parts = [_pair(_place(ours / day, label), _place(theirs / day, label), split, day) for day in common]
    alone = [(folder, sorted(one.difference(common))) for folder, one in zip((first, second), days, strict=True)]
    return parts, [f"Left out, because only {folder} has them: {', '.join(some)}." for folder, some in alone if some]


def _place(folder: Path, label: str) -> Path:
    """Return where the predictions of a run lie. Raises DataError: it has several labels and another one, or none, is
    named."""
    tasks = folder / TASKS
    names = sorted(one.name for one in tasks.iterdir()) if tasks.is_dir() else []
    if names and label not in names:
        raise DataError(f"{folder} has several labels; expected --label {' or '.join(names)}, found {label or 'none'}")
    return answer_folder(folder / PREDICTIONS, label)


def pooled(parts: list[Scored], *, by_group: bool) -> PairedRows:
    """Return all parts as one; by_group: rows of one group are a cluster, over all parts.

    Raises:
        DataError: by_group, and the predictions have no column group.
    """
    if by_group and any(part.group is None for part in parts):
        raise DataError("the predictions have no column group; expected one to resample by (schema.group)")
    weight = None
    if any(part.rows.weight is not None for part in parts):
        ones = [np.ones(len(part.rows.positive), np.float32) for part in parts]
        own = [part.rows.weight for part in parts]
        weight = np.concatenate([one if some is None else some for some, one in zip(own, ones, strict=True)])
    groups = [part.group for part in parts if part.group is not None]
    return PairedRows(
        np.concatenate([part.rows.first for part in parts]),
        np.concatenate([part.rows.second for part in parts]),
        np.concatenate([part.rows.positive for part in parts]),
        weight=weight,
        cluster=np.concatenate(groups) if by_group else None,
    )


def _pair(first: Path, second: Path, split: str | None, name: str | None) -> Scored:
    if split is None:
        known = [split_names(folder) for folder in (first, second)]
        split = next((one for one in (*PREFERRED_SPLITS, *known[0]) if one in known[0] and one in known[1]), None)
        if split is None:
            found = [
                f"{folder} has {', '.join(one) or 'no scored row'}"
                for folder, one in zip((first, second), known, strict=True)
            ]
            raise DataError(f"{' and '.join(found)}; expected a split that both have")
    (one, places), (other, other_places) = (_in_stored_order(folder, split) for folder in (first, second))
    _refuse_other_rows(first, second, split, places, other_places)
    for column, a, b in (("label", one.positive, other.positive), ("weight", _weight(one), _weight(other))):
        differing = np.flatnonzero(a != b)
        if len(differing):
            at = differing[0]
            raise DataError(
                f"{first} and {second}: {column} of row {places[at]} of {split} is {float(a[at]):g} in one and "
                f"{float(b[at]):g} in the other ({len(differing):,} such rows); expected the same data"
            )
    rows = PairedRows(one.prediction, other.prediction, one.positive, one.weight)
    return Scored(name or split, rows, one.group)


def _in_stored_order(folder: Path, split: str) -> tuple[Rows, np.ndarray]:
    rows, column = read_column(folder, split, ROW)
    if not pa.types.is_integer(column.type):
        raise DataError(f"{folder}: column {ROW} is {column.type}; expected integers")
    if column.null_count:
        raise DataError(f"{folder}: column {ROW} has {column.null_count:,} nulls; expected none")
    places = column.to_numpy()
    order = np.argsort(places, kind="stable")
    places = places[order]
    twice = np.flatnonzero(places[1:] == places[:-1])
    if len(twice):
        raise DataError(f"{folder}: row {places[twice[0]]} of {split} stands twice; expected each once")
    kept = [None if values is None else values[order] for values in (rows.weight, rows.group)]
    return Rows(rows.prediction[order], rows.positive[order], *kept), places


def _refuse_other_rows(first: Path, second: Path, split: str, places: np.ndarray, other: np.ndarray) -> None:
    if np.array_equal(places, other):
        return
    alone = np.setxor1d(places, other, assume_unique=True)
    raise DataError(
        f"{first} has {len(places):,} rows of {split} and {second} has {len(other):,}; {len(alone):,} rows are in one "
        f"alone, the first is row {alone[0]}; expected both to score the same data"
    )


def _weight(rows: Rows) -> np.ndarray:
    return np.ones(len(rows.positive), np.float32) if rows.weight is None else rows.weight
