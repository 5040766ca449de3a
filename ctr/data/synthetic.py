"""Write the synthetic Criteo-shaped data set, and beside it `teacher.json`: how well any model can do.

Rows are drawn in blocks of 8192 by threads and written in order, so the files depend on the config alone, not
on the threads. teacher.json holds for each split (or day) the AUC and logloss of the true probabilities
against the drawn labels, which is the best that a model can reach, up to the luck of the sample.
"""

from __future__ import annotations

import datetime
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from tessera.ctr.data.convert.output import PartsWriter, Writing, complete_folder, write_description
from tessera.ctr.data.convert.pipeline import schema_from_conf
from tessera.ctr.data.convert.split import SECONDS_PER_DAY, day_folder
from tessera.ctr.data.synthetic_rows import COUNT_NAMES, ID_NAMES, MISSING_IDS, Population, Rows, SyntheticConfig
from tessera.ctr.data.truth import DATA, STEPS, Truth
from tessera.embedding.errors import ConfigError

# The unit of drawing: small enough for the processor's caches, large enough for numpy.
BLOCK_ROWS = 8192
CEILINGS = "teacher.json"
SMALL_DICTIONARY = 4000


def write_synthetic(
    config: SyntheticConfig,
    output: Path,
    writing: Writing | None = None,
    threads: int = 1,
    *,
    overwrite: bool = False,
) -> dict:
    """Write the data set; returns the content of teacher.json.

    Raises ConfigError when `output` is in the way, for a start date that is none or no threads.
    """
    if threads < 1:
        raise ConfigError(f"threads: found {threads}, expected at least 1")
    parts = parts_of(config)
    writing = writing or Writing(row_group_rows=row_group_rows_of(config))
    population = Population(config)
    truth = Truth(config, population)
    distinct, splits = _DistinctIds(population), {}
    with (
        complete_folder(output, overwrite=overwrite) as folder,
        tqdm(total=config.rows, unit="rows", unit_scale=True, desc="synthetic", disable=None) as bar,
    ):
        writer = PartsWriter(folder, writing, _dictionary_columns(config, population))
        for name, day, first, last in parts:
            start = midnight(config) + day * SECONDS_PER_DAY
            day_rows = sum(end - begin for _, other, begin, end in parts if other == day)
            statistics = _SplitStatistics(population, day)
            distinct.open_day(day)
            for block in _blocks(population, truth, day, first, last, threads):
                statistics.add(block)
                writer.append(name, _table(block, start, day_rows, string_ids=config.string_ids))
                bar.update(len(block.label))
            distinct.merge(statistics.distinct)
            splits[name] = statistics.result()
        writer.close()
        result = {
            "parameters": asdict(config),
            "scales": asdict(truth.scales),
            "vocabulary": dict(zip(ID_NAMES, population.sizes, strict=True)),
            "distinct_ids": distinct.counts(),
            "splits": splits,
        }
        (folder / CEILINGS).write_text(json.dumps(result, indent=2) + "\n")
        schema = schema_from_conf("synthetic")
        if config.string_ids:
            schema["features"] = [_as_hex(feature) for feature in schema["features"]]
        write_description(folder, schema, {"kind": "synthetic", "rows": writer.rows, "parameters": asdict(config)})
    return result


def row_group_rows_of(config: SyntheticConfig) -> int:
    """Return a 64th of the rows, from 1024 to 16384: small enough that the reader's 16 lanes seldom share a row
    group."""
    return min(max(config.rows // 64, 1024), 16384)


class _Block:
    """Rows of one part, with their numbers within the day, probabilities and labels."""

    def __init__(self, population: Population, truth: Truth, day: int, first: int, last: int) -> None:
        self.first = first
        self.rows: Rows = population.draw(DATA, day, first, last - first)
        self.steps = truth.steps(self.rows, day)
        self.label = truth.labels(self.steps, day, first)


def _blocks(population: Population, truth: Truth, day: int, first: int, last: int, threads: int) -> Iterator[_Block]:
    """Yield the blocks of a part in order, drawn by `threads` threads, at most two per thread in flight."""
    cuts = [(begin, min(begin + BLOCK_ROWS, last)) for begin in range(first, last, BLOCK_ROWS)]
    if threads == 1:
        yield from (_Block(population, truth, day, *cut) for cut in cuts)
        return
    with ThreadPoolExecutor(threads) as pool:
        flying: deque[Future[_Block]] = deque()
        for cut in cuts:
            if len(flying) == 2 * threads:
                yield flying.popleft().result()
            flying.append(pool.submit(_Block, population, truth, day, *cut))
        while flying:
            yield flying.popleft().result()


class _DistinctIds:
    """Counts distinct ids in fixed memory: a flag for every id that can occur. Days are added in order, and
    at any time the ids of at most two generations of a rank can occur, so the flags of older ones are counted
    and reused."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.oldest, self.retired = [0] * 26, [0] * 26
        days = population.config.days
        self.alive = [2 if days and turning else 1 for turning in population.turning]
        self.flags = [np.zeros(shape, bool) for shape in zip(self.alive, population.sizes, strict=True)]

    def open_day(self, day: int) -> None:
        """Begin a day, before its rows are added."""
        for c, turning in enumerate(self.population.turning):
            oldest = int(day * self.population.config.new_ids) if turning else 0
            for generation in range(self.oldest[c], min(oldest, self.oldest[c] + 2)):
                flags = self.flags[c][generation % 2]
                self.retired[c] += int(flags.sum())
                flags[:] = False
            self.oldest[c] = oldest

    def add(self, block: _Block) -> None:
        rows = block.rows
        for c in range(26):
            there = ~rows.missing[c]
            self.flags[c][rows.generation[c][there] % self.alive[c], rows.rank[c][there]] = True

    def merge(self, other: _DistinctIds) -> None:
        """Add all ids of `other`, which has the same day open."""
        for mine, theirs in zip(self.flags, other.flags, strict=True):
            mine |= theirs

    def counts(self) -> dict[str, int]:
        counts = [retired + int(flags.sum()) for retired, flags in zip(self.retired, self.flags, strict=True)]
        return dict(zip(ID_NAMES, counts, strict=True))


class _SplitStatistics:
    """Statistics of one split or day for teacher.json, accumulated block by block."""

    def __init__(self, population: Population, day: int) -> None:
        self.population, self.day = population, day
        self.histogram = np.zeros((2, STEPS), np.int64)
        self.distinct = _DistinctIds(population)
        self.distinct.open_day(day)
        self.new = self.turning = 0

    def add(self, block: _Block) -> None:
        np.add.at(self.histogram, (block.label, block.steps), 1)
        self.distinct.add(block)
        for c in range(26):
            new = self.population.new_today(c, block.rows.rank[c], self.day)
            if new is not None:
                there = ~block.rows.missing[c]
                self.new += int((new & there).sum())
                self.turning += int(there.sum())

    def result(self) -> dict:
        """Return the keys of best_possible; distinct_ids; new_id_share: of the occurrences in columns that get new ids,
        those of ids that did not exist the day before (None on the first day)."""
        share = self.new / self.turning if self.turning else None
        return best_possible(self.histogram) | {"new_id_share": share, "distinct_ids": self.distinct.counts()}


def best_possible(histogram: np.ndarray) -> dict:
    """Return exact AUC and logloss of the probabilities k / 2^20 themselves, from int64 [2, 2^20]: rows by label and k.

    Keys: rows, positives, base_rate, auc (None with one class only), logloss.
    """
    negative, positive = histogram
    rows, positives = int(histogram.sum()), int(positive.sum())
    auc = None
    if 0 < positives < rows:
        below = np.cumsum(negative) - negative
        # Twice the pairs won plus the pairs tied, in whole numbers; below 2^63 for any number of rows below
        # 2^32.
        auc = int(positive @ (2 * below + negative)) / (2 * positives * (rows - positives))
    used = np.flatnonzero(histogram.sum(axis=0))
    probability = used / STEPS
    loss = -(positive[used] @ np.log(probability) + negative[used] @ np.log1p(-probability))
    return {
        "rows": rows,
        "positives": positives,
        "base_rate": positives / rows if rows else None,
        "auc": auc,
        "logloss": float(loss) / rows if rows else None,
    }


def parts_of(config: SyntheticConfig) -> list[tuple[str, int, int, int]]:
    """Return (folder, day, first row of the day, last row of the day + 1) of everything that is written."""
    if config.days:
        first_day = _start_date(config)
        cuts = [config.rows * d // config.days for d in range(config.days + 1)]
        days = [(day_folder(first_day + datetime.timedelta(days=d)), d) for d in range(config.days)]
        return [(name, d, 0, cuts[d + 1] - cuts[d]) for name, d in days if cuts[d + 1] > cuts[d]]
    test = round(config.rows * config.test)
    valid = round(config.rows * config.valid)
    cuts = [0, config.rows - valid - test, config.rows - test, config.rows]
    parts = zip(("train", "valid", "test"), cuts[:-1], cuts[1:], strict=True)
    return [(name, 0, first, last) for name, first, last in parts if last > first]


def _start_date(config: SyntheticConfig) -> datetime.date:
    try:
        return datetime.date.fromisoformat(config.start_date)
    except ValueError:
        raise ConfigError(f"start_date: found {config.start_date!r}, expected a date as 2026-01-01") from None


def midnight(config: SyntheticConfig) -> int:
    return (_start_date(config) - datetime.date(1970, 1, 1)).days * SECONDS_PER_DAY


def _table(block: _Block, start: int, day_rows: int, *, string_ids: bool) -> pa.Table:
    rows = block.rows
    numbers = np.arange(block.first, block.first + len(block.label), dtype=np.int64)
    columns: dict[str, pa.Array] = {
        "label": pa.array(block.label),
        "time": pa.array(start + numbers * SECONDS_PER_DAY // day_rows),
    }
    for name, counts in zip(COUNT_NAMES, rows.counts, strict=True):
        columns[name] = pa.array(counts, from_pandas=True)  # NaN -> null
    for c, name in enumerate(ID_NAMES):
        mask = rows.missing[c] if c + 1 in MISSING_IDS else None
        columns[name] = _hex_strings(rows.raw[c], mask) if string_ids else pa.array(rows.raw[c], mask=mask)
    return pa.table(columns)


HEX_PAIRS = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint16)


def _hex_strings(raw: np.ndarray, mask: np.ndarray | None) -> pa.Array:
    """Return 16 hexadecimal digits for each id, most significant first."""
    digits = HEX_PAIRS[raw.astype(">i8").view(np.uint8)]
    offsets = np.arange(len(raw) + 1, dtype=np.int32) * 16
    array = pa.StringArray.from_buffers(len(raw), pa.py_buffer(offsets), pa.py_buffer(digits))
    if mask is None:
        return array
    return array.take(pa.array(np.arange(len(raw)), mask=mask))


def _as_hex(feature: dict) -> dict:
    return feature | {"dtype": "hex"} if feature["kind"] == "id" else feature


def _dictionary_columns(config: SyntheticConfig, population: Population) -> list[str]:
    """Return the columns to store with a dictionary: it makes small vocabularies smaller to store and faster to read,
    and only costs with large ones."""
    small = [name for name, size in zip(ID_NAMES, population.sizes, strict=True) if size <= SMALL_DICTIONARY]
    return ["label", *COUNT_NAMES, *small]
