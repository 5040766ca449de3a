"""Write a synthetic click log whose labels depend on the newest events of each row's history, and beside it
`teacher.json` with the best AUC and logloss that a model can reach.

    logit = bias + 1/2 w(item) + signal * [the item's category is that of one of the newest `recent` events]

Half of the rows' items are drawn from the categories of the recent events and a quarter from those of older ones, so
that a sum over the whole history says little of what counts. Event number r before the row, the newest being 1, lies
60 (r - 1) + 1 to 60 r seconds before it: its age says which events are recent. w(item) is hashed from the item's id.
Every value is a function of (seed, day, row, column), as in `synthetic_rows.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tessera.ctr.data.convert.output import PartsWriter, Writing, complete_folder, write_description
from tessera.ctr.data.convert.pipeline import schema_from_conf
from tessera.ctr.data.convert.split import SECONDS_PER_DAY
from tessera.ctr.data.counter_random import bits, key, mix64, uniform
from tessera.ctr.data.synthetic import CEILINGS, best_possible, midnight, parts_of
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.data.truth import SQRT_3, STEPS
from tessera.embedding.errors import ConfigError

BLOCK_ROWS = 8192
GAP = 60  # seconds between events
BIAS, OF_ITEM = -1.5, 0.5
ACTIONS = 3  # what a user did with an item, in the shape of the benchmark: 1 listened, 2 liked, 3 skipped
# The purpose of a stream of random numbers; part of its key.
LENGTH, CATEGORY, ITEM, AGE, ACTION, TARGET, USER, LABEL, WEIGHT, SCRAMBLE = range(21, 31)
USERS, ITEMS, CATEGORIES = 1, 2, 3  # kinds of ids, in their upper bits


@dataclass(frozen=True)
class HistoriesConfig:
    """Settings that determine the data set."""

    rows: int = 100_000  # of all splits or days together
    days: int = 0  # 0: train, valid and test; otherwise so many days, day=YYYY-MM-DD
    start_date: str = "2026-01-01"
    seed: int = 2026
    valid: float = 0.1  # fraction of the rows, where there are no days
    test: float = 0.1
    length: int = 50  # of the longest history; lengths are uniform, one row in 20 has none
    recent: int = 5  # newest events that the label depends on
    categories: int = 50
    items: int = 100  # of a category
    users: int = 1000
    signal: float = 3.0  # what a recent event of the item's category adds to the logit

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the key."""
        for name in ("length", "recent", "categories", "items", "users"):
            if not 1 <= getattr(self, name) < 1 << 20:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected at least 1 and less than 2^20")
        self.rows_and_days()

    def rows_and_days(self) -> SyntheticConfig:
        """Return the settings that say which rows there are. Raises ConfigError."""
        return SyntheticConfig(self.rows, self.days, self.start_date, self.seed, self.valid, self.test)


@dataclass(frozen=True)
class HistoryBlock:
    """n rows with histories of up to L events, newest first. item, category: int64 [n], numbers of the item (within its
    category) and category of the row; events: int64 [n, L] by name: item, category, action, age; lengths: int64 [n];
    steps: probabilities, int64 [n] in units of 2^-20; label: int8 [n]."""

    user: np.ndarray
    item: np.ndarray
    category: np.ndarray
    events: dict[str, np.ndarray]
    lengths: np.ndarray
    steps: np.ndarray
    label: np.ndarray


def draw(config: HistoriesConfig, day: int, first: int, rows: int) -> HistoryBlock:
    """Draw the rows first to first + rows of a day."""

    def drawn(stream: int, columns: int) -> np.ndarray:
        counters = np.arange(first * columns, (first + rows) * columns, dtype=np.uint64)
        return uniform(bits(key(config.seed, stream, day), counters)).reshape(rows, columns)

    def below(limit: int, stream: int, columns: int) -> np.ndarray:
        return (drawn(stream, columns) * limit).astype(np.int64)

    length = config.length
    lengths = below(length * 20, LENGTH, 1)[:, 0]
    lengths = np.where(lengths < length, 0, 1 + lengths % length)
    places = np.arange(length)
    events = {
        "category": below(config.categories, CATEGORY, length),
        "item": _skewed(drawn(ITEM, length), config.items),
        "action": 1 + below(ACTIONS, ACTION, length),
        "age": GAP * places + 1 + below(GAP, AGE, length),
    }
    how, which, other, item, user = drawn(TARGET, 5).T
    recent = np.minimum(lengths, config.recent)
    older = lengths - recent
    at = np.where(how < 0.5, which * recent, recent + which * older).astype(np.int64)
    from_history = np.where(how < 0.5, recent > 0, (how < 0.75) & (older > 0))
    of_event = events["category"][np.arange(rows), np.minimum(at, length - 1)]
    category = np.where(from_history, of_event, (other * config.categories).astype(np.int64))
    match = ((events["category"] == category[:, None]) & (places < recent[:, None])).any(1)
    item = _skewed(item, config.items)
    logit = BIAS + OF_ITEM * _weight(config, category, item) + config.signal * match
    steps = np.clip(np.rint(STEPS / (1.0 + np.exp(-logit))), 1, STEPS - 1).astype(np.int64)
    label = (drawn(LABEL, 1)[:, 0] * STEPS < steps).astype(np.int8)
    return HistoryBlock((user * config.users).astype(np.int64), item, category, events, lengths, steps, label)


def _skewed(x: np.ndarray, items: int) -> np.ndarray:
    """Return numbers below `items`, small ones more often, from uniform x."""
    return np.minimum((items * x * x).astype(np.int64), items - 1)


def _weight(config: HistoriesConfig, category: np.ndarray, item: np.ndarray) -> np.ndarray:
    counters = (category * config.items + item).astype(np.uint64)
    return SQRT_3 * (2.0 * uniform(bits(key(config.seed, WEIGHT), counters)) - 1.0)


def write_histories(config: HistoriesConfig, output: Path, writing: Writing, *, overwrite: bool = False) -> dict:
    """Write the data set; returns the content of teacher.json. Raises ConfigError when `output` is in the way."""
    shape = config.rows_and_days()
    splits = {}
    with complete_folder(output, overwrite=overwrite) as folder:
        writer = PartsWriter(folder, writing)
        parts = parts_of(shape)
        for name, day, first, last in parts:
            day_rows = max(stop for _, other, _, stop in parts if other == day)
            start = midnight(shape) + day * SECONDS_PER_DAY
            histogram = np.zeros((2, STEPS), np.int64)
            for begin in range(first, last, BLOCK_ROWS):
                block = draw(config, day, begin, min(BLOCK_ROWS, last - begin))
                np.add.at(histogram, (block.label, block.steps), 1)
                writer.append(name, _table(config, block, start, begin, day_rows))
            splits[name] = best_possible(histogram)
        writer.close()
        result = {"parameters": asdict(config), "splits": splits}
        (folder / CEILINGS).write_text(json.dumps(result, indent=2) + "\n")
        schema = schema_from_conf("synthetic_histories")
        for feature in schema["features"]:
            if "max_length" in feature:
                feature["max_length"] = config.length
        summary = {"kind": "synthetic-histories", "rows": writer.rows, "parameters": asdict(config)}
        write_description(folder, schema, summary)
    return result


def _table(config: HistoriesConfig, block: HistoryBlock, start: int, first: int, day_rows: int) -> pa.Table:
    numbers = np.arange(first, first + len(block.label), dtype=np.int64)

    def ids(kind: int, number: np.ndarray) -> np.ndarray:
        packed = (number.astype(np.uint64) | np.uint64(kind << 56)) ^ key(config.seed, SCRAMBLE)
        return mix64(packed).view(np.int64)

    # Oldest first, as logs and the reader have it: the last `lengths` places of the events turned round.
    kept = np.arange(config.length) >= (config.length - block.lengths)[:, None]
    events = {name: values[:, ::-1][kept] for name, values in block.events.items()}
    offsets = pa.array(np.concatenate([[0], np.cumsum(block.lengths)]).astype(np.int32))

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    return pa.table(
        {
            "label": pa.array(block.label),
            "time": pa.array(start + numbers * SECONDS_PER_DAY // day_rows),
            "user_id": pa.array(ids(USERS, block.user)),
            "item_id": pa.array(ids(ITEMS, block.category * config.items + block.item)),
            "category": pa.array(ids(CATEGORIES, block.category)),
            "history_item_id": lists(ids(ITEMS, events["category"] * config.items + events["item"])),
            "history_category": lists(ids(CATEGORIES, events["category"])),
            "history_action": lists(events["action"]),
            "history_seconds_ago": lists(events["age"]),
        }
    )
