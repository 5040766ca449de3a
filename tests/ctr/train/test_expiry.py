"""Rows expire by the times of their own events, on a schedule of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.train.clock import ttl_in_vain
from tessera.ctr.train.trainer import Trainer
from tests.ranks import on_ranks

DAYS, ROWS, DAY, NOW = 20, 60, 86_400, 20_454 * 86_400
TTL = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twenty days. `row` is different in every row, `often` comes on all days, `daily` is new on each day."""
    folder, draw = tmp_path_factory.mktemp("days"), np.random.default_rng(1)
    for day in range(DAYS):
        table = {
            "label": draw.integers(0, 2, ROWS).astype(np.int8),
            "time": NOW + day * DAY + np.sort(draw.integers(0, DAY, ROWS)),
            "row": np.arange(ROWS) + day * ROWS,
            "often": draw.integers(0, 20, ROWS),
            "daily": draw.integers(0, 9, ROWS) + day * 100,
        }
        (folder / "train" / f"day-{day:02d}").mkdir(parents=True)
        pq.write_table(pa.table(table), folder / "train" / f"day-{day:02d}" / "part.parquet", row_group_size=20)
    return folder


def trainer_of(process, data: Path, run_dir: Path, *more: str) -> Trainer:
    fixed = ["data=synthetic", "data.schema.features=[{name: row}, {name: often}, {name: daily, table: daily}]"]
    none = ["data.valid=null", "data.test=null", "trainer.device=cpu", "trainer.threads=1", "embedding.rows=3000"]
    small = ["model.hidden=[4]", "model.embedding_dim=2", "trainer.batch_size=40", "embedding.expire_every=3"]
    paths = [f"data.path={data}", f"trainer.run_dir={run_dir}", f"embedding.ttl_days={TTL}"]
    return Trainer(load_config([*fixed, *none, *small, *paths, *more], ""), process)


def steps(trainer: Trainer) -> Iterator[None]:
    """Train what is left of the epoch; yields behind each step."""
    for batch in trainer.readers.train_batches(trainer.engine, trainer.log):
        loss_sum, weight = trainer.engine.train_step(batch)
        trainer.engine.expire_if_due()
        trainer.log.train(trainer.engine, batch, loss_sum, weight)
        yield


def rows_of(trainer: Trainer) -> dict[tuple[str, int], tuple]:
    """(table, id) -> time, count and bits of all that is stored, of this rank."""
    return {
        (name, int(i)): (int(seen), int(count), torch.cat([values, state]).numpy().tobytes())
        for name, table in trainer.engine.tables.owned().items()
        for rows in table.export_rows()
        for i, seen, count, values, state in zip(
            rows.ids, rows.last_seen, rows.count, rows.values, rows.state, strict=True
        )
    }


def rows_by_step(process, data, run_dir, *more):
    """Rows of all tables of this rank after each step, and the rows at the end, the clock's time with them."""
    trainer = trainer_of(process, data, run_dir, *more)
    sizes = []
    for _ in steps(trainer):
        sizes.append(sum(int(stats["rows"]) for stats in trainer.engine.tables.stats().values()))
    trainer.engine.tables.expire(trainer.progress.now, everywhere=True)
    trainer.log.close()
    return sizes, rows_of(trainer), trainer.progress.now


def test_rows_expire_where_every_batch_holds_rows_of_all_days(tmp_path, data):
    """16 lanes over 20 days and a TTL of 2: what is left are the ids of the last two days, on 1 and 2 ranks."""
    ends = {}
    for world in (1, 2):
        results = on_ranks(world, rows_by_step, data, tmp_path / str(world), "data.lanes=16")
        sizes = [sum(step) for step in zip(*(sizes for sizes, *_ in results), strict=True)]
        rows = {key: row[:2] for _, rows, _ in results for key, row in rows.items()}
        (now,) = {now for *_, now in results}
        # Three steps bring 120 rows and a few ids of the other tables; two days have 120 rows and 18 + 20 ids.
        assert max(sizes) < 400 and len(sizes) == DAYS * ROWS // 40
        assert NOW + (DAYS - 1) * DAY < now < NOW + DAYS * DAY
        assert all(now - TTL * DAY < seen <= now for seen, _ in rows.values())
        ends[world] = rows
    assert ends[1] == ends[2]
    table = {name: np.concatenate(parts) for name, parts in columns_of(data).items()}
    alive = table["time"] > now - TTL * DAY
    for name in ("row", "often", "daily"):
        assert {i for table, i in ends[1] if table == name} == set(table[name][alive].tolist())


def columns_of(data: Path) -> dict[str, list[np.ndarray]]:
    tables = [pq.read_table(path) for path in sorted(data.rglob("*.parquet"))]
    return {name: [table[name].to_numpy() for table in tables] for name in tables[0].column_names}


def losses_and_rows(process, data, run_dir, *more):
    trainer = trainer_of(process, data, run_dir, *more)
    losses, train_step = [], trainer.engine.train_step

    def noted(batch):
        losses.append(train_step(batch))
        return losses[-1]

    trainer.engine.train_step = noted
    for _ in steps(trainer):
        pass
    trainer.log.close()
    dense = [p.detach().numpy().tobytes() for p in trainer.engine.model.module.dense_parameters().values()]
    return torch.stack([loss for loss, _ in losses]).numpy().tobytes(), rows_of(trainer), dense


@pytest.mark.parametrize("cache", [[], ["embedding.cache_rows=260"]], ids=["plain", "cache"])
def test_log_lines_change_nothing(process, tmp_path, data, cache):
    found = [
        losses_and_rows(process, data, tmp_path / str(every), f"trainer.log_every={every}", *cache)
        for every in (1, 7, 1000)
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][1] and all(seen > 0 for seen, *_ in found[0][1].values())


def test_the_schedule_is_counted_in_steps(process, tmp_path, data):
    """Every step, the usual number, and hardly ever: the first keeps the fewest rows."""
    keys = [f"embedding.expire_every={every}" for every in (1, 20, 999)]
    sizes = [rows_by_step(process, data, tmp_path / key, key)[0] for key in keys]
    assert sum(sizes[0]) < sum(sizes[1]) < sum(sizes[2]) and sizes[2] == sorted(sizes[2])


def test_day_after_day_only_the_days_of_the_ttl_are_there(tmp_path, data):
    """data.order=time: at each day's end the ids of that day and the two before, on 1 and 2 ranks, in both epochs."""
    ends = []
    for world in (1, 2):
        results = on_ranks(world, two_epochs_in_order, data, tmp_path / str(world))
        ends.append({key: row for rows, _ in results for key, row in rows.items()})
        kept = [set().union(*(days[i] for _, days in results)) for i in range(len(results[0][1]))]
        assert len(kept) == 2 * DAYS
        for number, days in enumerate(kept):
            day = number % DAYS
            old = {DAYS - 3, DAYS - 2, DAYS - 1} if number >= DAYS else set()  # of the first epoch's end
            assert {day, max(0, day - 1)} <= days <= {day, max(0, day - 1), max(0, day - 2)} | old
    assert ends[0] == ends[1]


def two_epochs_in_order(process, data, run_dir):
    """Times and counts of rows at the end; and after each day of which days this rank has rows in table `row`."""
    options = ("data.order=time", "trainer.shuffle=true", "embedding.expire_every=1", "data.lanes=4")
    trainer, days = trainer_of(process, data, run_dir, *options), []
    for trainer.progress.epoch in (0, 1):
        for number, _ in enumerate(steps(trainer), 1):
            if number % 2 == 0:  # a day is two batches, of 40 and of 20 rows
                (found,) = [torch.cat([r.ids for r in trainer.engine.tables.owned()["row"].export_rows()])]
                days.append(set((found // ROWS).tolist()))
    trainer.log.close()
    return {key: row[:2] for key, row in rows_of(trainer).items()}, days


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "a batch holds rows of 19.9 days: ids of the first expire as soon as they are trained; data.order=time"),
        (
            ["data.order=time", "data.period_days=4"],
            "rows of 4.0 days: ids of the first expire while their days are read",
        ),
        (["data.order=time"], None),
        (["embedding.ttl_days=21"], None),
        (["embedding.clock=wall"], None),
        (["embedding.ttl_days=null"], None),
    ],
)
def test_a_ttl_that_cannot_mean_what_it_says_is_told_at_the_start(process, tmp_path, data, options, words):
    trainer = trainer_of(process, data, tmp_path / "run", *options)
    found = ttl_in_vain(trainer.config, trainer.readers["train"])
    trainer.log.close()
    assert found is None if words is None else words in found


@pytest.mark.parametrize("wrong", [2**40, NOW + 300 * DAY, NOW + 3000 * DAY, -1])
def test_one_row_of_another_time_expires_nothing(process, tmp_path, data, wrong):
    """Whether it is left out as a bad row, or is one of the rows: all ids of three days are there at the end."""
    parts = [pq.read_table(data / "train" / f"day-{day:02d}") for day in range(3)]
    table = pa.concat_tables(parts)
    times = table["time"].to_numpy().copy()
    times[70] = wrong
    (tmp_path / "data" / "train").mkdir(parents=True)
    table = table.set_column(table.column_names.index("time"), "time", pa.array(times))
    pq.write_table(table, tmp_path / "data" / "train" / "part.parquet", row_group_size=60)
    options = ("embedding.ttl_days=30", "embedding.expire_every=1", "data.bad_rows=skip", "data.lanes=1")
    _, rows, now = rows_by_step(process, tmp_path / "data", tmp_path / "run", *options)
    known = {i for table, i in rows if table == "row"}
    assert known | {70} == set(range(3 * ROWS)) and NOW + 2 * DAY < now < NOW + 3 * DAY
    assert all(seen <= now for seen, *_ in rows.values())
