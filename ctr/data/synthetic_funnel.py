"""Write a synthetic log of impressions, clicks and purchases, and beside it `teacher.json` with the best AUC and
logloss that a model can reach for each label.

    logit click = bias + signal * (sum_c a_c + <u, i>)              p(click | x)
    logit buy   = bias' + signal * (sum_c a'_c + <u', i'>)          p(buy | click, x)
    a' = shared a + sqrt(1 - shared^2) b, and so u', i'

over the ids of a row: a, b are hashed from the column and id, u and i are vectors of three, of the user and the item.
So what a click tells of an id tells something of purchases, and clicked rows are no random ones. `would_buy` is drawn
for every row; `buy` is it after a click, and 0 without one, as a log has it. With `would_buy` the conversion rate can
be measured on all rows, which no log allows.

Every value is a function of (seed, day, row, column), as in `synthetic_rows.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from tessera.ctr.data.convert.output import PartsWriter, Writing, complete_folder, write_description
from tessera.ctr.data.convert.pipeline import schema_from_conf
from tessera.ctr.data.convert.split import SECONDS_PER_DAY
from tessera.ctr.data.counter_random import bits, key, uniform
from tessera.ctr.data.synthetic import CEILINGS, best_possible, midnight, parts_of
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.data.truth import SQRT_3, STEPS
from tessera.embedding.errors import ConfigError

BLOCK_ROWS, PILOT_ROWS = 8192, 32768
CONTEXTS, CONTEXT_IDS = ("device", "place", "hour"), 40
VECTOR = 3  # length of u and i
EVEN = 1 / (2 + len(CONTEXTS))  # share of the logit's variance of each column and of <u, i> is about even
# The purpose of a stream of random numbers; part of its key.
IDS, CLICK, BUY, EFFECT, OWN_EFFECT, PILOT = range(41, 47)


@dataclass(frozen=True)
class FunnelConfig:
    """Settings that determine the data set."""

    rows: int = 200_000  # of all splits or days together
    days: int = 0  # 0: train, valid and test; otherwise so many days, day=YYYY-MM-DD
    start_date: str = "2026-01-01"
    seed: int = 2026
    valid: float = 0.1  # fraction of the rows, where there are no days
    test: float = 0.1
    users: int = 4000
    items: int = 2000
    click_rate: float = 0.1  # mean probability of a click
    buy_rate: float = 0.1  # mean probability of a purchase after a click, over all rows
    signal: float = 1.5  # standard deviation of both logits, about
    shared: float = 0.8  # correlation of what ids do to clicks and to purchases

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the key."""
        for name in ("users", "items"):
            if not 2 <= getattr(self, name) < 1 << 30:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected at least 2 and less than 2^30")
        for name in ("click_rate", "buy_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected above 0 and below 1")
        if not self.signal > 0:
            raise ConfigError(f"signal: found {self.signal}, expected above 0")
        if not 0 <= self.shared <= 1:
            raise ConfigError(f"shared: found {self.shared}, expected from 0 to 1")
        self.rows_and_days()

    def rows_and_days(self) -> SyntheticConfig:
        """Return the settings that say which rows there are. Raises ConfigError."""
        return SyntheticConfig(self.rows, self.days, self.start_date, self.seed, self.valid, self.test)


@dataclass(frozen=True)
class FunnelBlock:
    """n rows. ids: int64 [n] by column; click_steps, buy_steps: p(click | x) and p(buy | click, x), int64 [n] in units
    of 2^-20; click, would_buy: int8 [n]."""

    ids: dict[str, np.ndarray]
    click_steps: np.ndarray
    buy_steps: np.ndarray
    click: np.ndarray
    would_buy: np.ndarray

    @property
    def buy(self) -> np.ndarray:
        return self.click * self.would_buy

    @property
    def both_steps(self) -> np.ndarray:
        """Return p(click and buy | x) in units of 2^-20, at least 1."""
        return np.clip(np.rint(self.click_steps * (self.buy_steps / STEPS)), 1, STEPS - 1).astype(np.int64)


class Funnel:
    """Knows every probability. All methods are functions of their arguments and the config alone."""

    def __init__(self, config: FunnelConfig) -> None:
        self.config = config
        self.sizes = {"user_id": config.users, "item_id": config.items, **dict.fromkeys(CONTEXTS, CONTEXT_IDS)}

    def draw(self, day: int, first: int, rows: int) -> FunnelBlock:
        """Draw the rows first to first + rows of a day."""
        ids = self._ids(day, first, rows)
        steps = [
            _steps(self.config.signal * logit + bias) for logit, bias in zip(self._sums(ids), self.biases, strict=True)
        ]
        drawn = [
            (self._uniform(stream, day, first, rows) * STEPS < one).astype(np.int8)
            for stream, one in zip((CLICK, BUY), steps, strict=True)
        ]
        return FunnelBlock(ids, *steps, *drawn)

    @cached_property
    def biases(self) -> tuple[float, float]:
        """Of both logits, by which mean probabilities are the rates, set by a pilot sample."""
        sums = self._sums(self._ids(-PILOT, 0, PILOT_ROWS))
        click, buy = (
            _bias(self.config.signal * logit, rate)
            for logit, rate in zip(sums, (self.config.click_rate, self.config.buy_rate), strict=True)
        )
        return click, buy

    def _uniform(self, stream: int, day: int, first: int, rows: int, *more: int) -> np.ndarray:
        counters = np.arange(first, first + rows, dtype=np.uint64)
        return uniform(bits(key(self.config.seed, stream, day % (1 << 32), *more), counters))

    def _ids(self, day: int, first: int, rows: int) -> dict[str, np.ndarray]:
        """Return ids below the columns' sizes, small ones more often."""
        found = {}
        for column, (name, size) in enumerate(self.sizes.items()):
            x = self._uniform(IDS, day, first, rows, column)
            found[name] = np.minimum((size * x * x).astype(np.int64), size - 1)
        return found

    def _sums(self, ids: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return what ids do to the logits of click and purchase, float64 [n] of variance about 1."""
        effects = [self._effects(column, one) for column, one in enumerate(ids.values())]
        found = []
        for which in (0, 1):
            of_columns = sum(one[which][:, 0] for one in effects)
            user, item = effects[0][which][:, 1:], effects[1][which][:, 1:]
            pair = (user * item).sum(1) / np.sqrt(VECTOR)
            found.append((of_columns + pair) / np.sqrt(len(effects) + 1))
        return found[0], found[1]

    def _effects(self, column: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what ids do to clicks and to purchases: weight and vector, float64 [n, 1 + VECTOR], variance 1."""
        counters = (ids[:, None] * (1 + VECTOR) + np.arange(1 + VECTOR)).astype(np.uint64)
        common, own = (
            SQRT_3 * (2 * uniform(bits(key(self.config.seed, stream, column), counters.ravel())) - 1)
            for stream in (EFFECT, OWN_EFFECT)
        )
        shared = self.config.shared
        other = shared * common + np.sqrt(1 - shared**2) * own
        return common.reshape(counters.shape), other.reshape(counters.shape)


def _steps(logit: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(STEPS / (1.0 + np.exp(-logit))), 1, STEPS - 1).astype(np.int64)


def _bias(logit: np.ndarray, rate: float) -> float:
    low, high = -50.0, 50.0
    for _ in range(60):
        bias = (low + high) / 2
        above = np.mean(1.0 / (1.0 + np.exp(-(logit + bias)))) > rate
        low, high = (low, bias) if above else (bias, high)
    return bias


class _Ceilings:
    """Best metrics of each label of one split, accumulated block by block."""

    def __init__(self) -> None:
        names = ("click", "buy", "click_and_buy", "buy_on_all_rows")
        self.histograms = {name: np.zeros((2, STEPS), np.int64) for name in names}

    def add(self, block: FunnelBlock) -> None:
        clicked = block.click == 1
        everything = {
            "click": (block.click, block.click_steps),
            "buy": (block.would_buy[clicked], block.buy_steps[clicked]),
            "click_and_buy": (block.buy, block.both_steps),
            "buy_on_all_rows": (block.would_buy, block.buy_steps),
        }
        for name, (label, steps) in everything.items():
            np.add.at(self.histograms[name], (label, steps), 1)

    def result(self) -> dict:
        """Return the ceilings of click, and by label in `tasks`; buy is measured on clicked rows, buy_on_all_rows by
        what would be bought."""
        tasks = {name: best_possible(one) for name, one in self.histograms.items()}
        return tasks["click"] | {"tasks": tasks}


def write_funnel(config: FunnelConfig, output: Path, writing: Writing, *, overwrite: bool = False) -> dict:
    """Write the data set; returns the content of teacher.json. Raises ConfigError when `output` is in the way."""
    shape, funnel, splits = config.rows_and_days(), Funnel(config), {}
    with complete_folder(output, overwrite=overwrite) as folder:
        writer = PartsWriter(folder, writing)
        parts = parts_of(shape)
        for name, day, first, last in parts:
            day_rows = max(stop for _, other, _, stop in parts if other == day)
            start = midnight(shape) + day * SECONDS_PER_DAY
            ceilings = _Ceilings()
            for begin in range(first, last, BLOCK_ROWS):
                block = funnel.draw(day, begin, min(BLOCK_ROWS, last - begin))
                ceilings.add(block)
                numbers = np.arange(begin, begin + len(block.click), dtype=np.int64)
                columns = {"click": block.click, "buy": block.buy, "would_buy": block.would_buy}
                columns |= {"time": start + numbers * SECONDS_PER_DAY // day_rows, **block.ids}
                writer.append(name, pa.table(columns))
            splits[name] = ceilings.result()
        writer.close()
        result = {"parameters": asdict(config), "splits": splits}
        (folder / CEILINGS).write_text(json.dumps(result, indent=2) + "\n")
        summary = {"kind": "synthetic-funnel", "rows": writer.rows, "parameters": asdict(config)}
        write_description(folder, schema_from_conf("synthetic_funnel"), summary)
    return result
