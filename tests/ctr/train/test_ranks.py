"""DeepFM trained on 1, 2 and 3 ranks with the same global batches: the same ids, rows and dense weights."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.train.evaluate import read_split
from tessera.ctr.train.trainer import Trainer
from tests.ranks import on_ranks

DAYS, ROWS, BATCH = 8, 500, 64  # 8 batches a day, the last one short and none divisible by 3
SCHEMA = (
    "data.schema.features=[{name: x, kind: numeric, transform: standardise}, {name: user}, {name: item},"
    " {name: seen, kind: ids, table: item}, {name: tags, kind: ids, pooling: sum}]"
)


def write_days(folder: Path) -> None:
    """Eight days on which the popular ids drift, so that ids come, are admitted late, go, and come back."""
    generator = np.random.default_rng(5)
    for day in range(DAYS):
        lengths = generator.integers(0, 5, (2, ROWS))

        def ids(count: int, spread: int, day: int = day) -> np.ndarray:
            return generator.zipf(1.6, count) % spread * 7919 + day // 2 * 101

        def lists(which: int, spread: int, lengths: np.ndarray = lengths) -> pa.ListArray:
            offsets = np.concatenate([[0], np.cumsum(lengths[which])])
            return pa.ListArray.from_arrays(offsets, ids(offsets[-1], spread))

        columns = {
            "label": generator.integers(0, 2, ROWS).astype(np.int8),
            "time": (20454 + day) * 86400 + np.sort(generator.integers(0, 86400, ROWS)),
            "x": generator.normal(size=ROWS).astype(np.float32),
            "user": ids(ROWS, 300),
            "item": ids(ROWS, 80),
            "seen": lists(0, 80),
            "tags": lists(1, 20),
        }
        path = folder / "train" / f"day=2026-01-{day + 1:02d}" / "part-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), path, row_group_size=100)


def train(process, data: str, run_dir: str, overrides: tuple[str, ...]):
    """Trains day after day; gives this rank's rows, the dense weights, and counts of all that happened to rows."""
    fixed = ["data.schema.time=time", "data.valid=null", "data.test=null", "data.lanes=6", "trainer.device=cpu"]
    model = ["model.hidden=[16,16]", "model.embedding_dim=8", f"trainer.batch_size={BATCH}", "embedding.ttl_days=2"]
    admission = ["embedding.admission.kind=exact", "embedding.admission.threshold=2", "embedding.rows=500"]
    paths = [f"data.path={data}", f"trainer.run_dir={run_dir}"]
    config = load_config([SCHEMA, *fixed, *model, *admission, *paths, *overrides], "")
    trainer = Trainer(config, process)
    for day in range(DAYS):
        config.data.days = [f"2026-01-{day + 1:02d}"]
        for batch in read_split(config, trainer.engine.schema, process, "train").epoch(0):
            trainer.engine.train_step(batch)
            trainer.engine.tables.expire(trainer.progress.now)
    rows = {
        (name, int(i)): (torch.cat([v, s]), int(seen), int(count))
        for name, table in trainer.engine.tables.owned().items()
        for b in table.export_rows()
        for i, v, s, seen, count in zip(b.ids, b.values, b.state, b.last_seen, b.count, strict=True)
    }
    dense = {name: p.detach().clone() for name, p in trainer.engine.model.module.dense_parameters().items()}
    stats = trainer.engine.tables.stats()
    steps = trainer.engine.step
    trainer.log.close()
    return rows, dense, stats, steps


def joined(results):
    rows = {key: row for part, *_ in results for key, row in part.items()}
    assert len(rows) == sum(len(part) for part, *_ in results)
    for _, dense, _, steps in results:
        assert steps == 64
        assert all(torch.equal(value, results[0][1][name]) for name, value in dense.items())
    counts = {
        (name, key): sum(stats[name][key] for *_, stats, _ in results)
        for name in results[0][2]
        for key in ("rows", "new", "admitted", "rejected", "expired")
    }
    return rows, results[0][1], counts


def agree(found, expected) -> None:
    (rows, dense, counts), (expected_rows, expected_dense, expected_counts) = found, expected
    assert rows.keys() == expected_rows.keys() and counts == expected_counts
    for key, (values, seen, count) in expected_rows.items():
        assert rows[key][1:] == (seen, count)
        close(rows[key][0], values)
    assert dense.keys() == expected_dense.keys()
    for name, value in expected_dense.items():
        close(dense[name], value)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-4 relative; a number near 0 among larger ones is as exact as these are."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("days")
    write_days(folder)
    return str(folder)


@pytest.mark.parametrize("worlds", [(3,), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_ids_rows_and_dense_weights_agree(tmp_path, data, worlds):
    """By default on three ranks, among which no batch divides."""
    trained = {world: joined(on_ranks(world, train, data, str(tmp_path / str(world)), ())) for world in (1, *worlds)}
    for (_, key), number in trained[1][2].items():
        assert number > 0, key  # rows are admitted, refused and expired
    for world in worlds:
        agree(trained[world], trained[1])


@pytest.mark.slow
def test_they_agree_with_learned_others_and_sums_of_owners(tmp_path, data):
    others = ("embedding.oov=learned",)
    rows = joined(on_ranks(1, train, data, str(tmp_path / "rows"), others))
    sums = joined(on_ranks(2, train, data, str(tmp_path / "sums"), (*others, "embedding.pooled_output_dist=always")))
    agree(sums, rows)


def one_step(process, data: str, run_dir: str) -> dict[tuple[str, int], tuple[torch.Tensor, int]]:
    """One step of SGD at rate 1 on the first day: (table, id) -> values and count of this rank's rows."""
    fixed = ["data.schema.time=time", "data.valid=null", "data.test=null", "data.lanes=6", "trainer.device=cpu"]
    sgd = ["optimizer.sparse.name=sgd", "optimizer.sparse.lr=1", f"trainer.batch_size={ROWS}", "trainer.threads=1"]
    paths = [f"data.path={data}", f"trainer.run_dir={run_dir}", "data.days=[2026-01-01]", "model.hidden=[16]"]
    config = load_config([SCHEMA, *fixed, *sgd, *paths], "")
    trainer = Trainer(config, process)
    trainer.engine.train_step(next(iter(trainer.readers["train"].epoch(0))))
    trainer.log.close()
    return {
        (name, int(i)): (values, int(count))
        for name, table in trainer.engine.tables.owned().items()
        for batch in table.export_rows()
        for i, values, count in zip(batch.ids, batch.values, batch.count, strict=True)
    }


def test_rows_seen_once_are_the_same_on_one_and_two_ranks(tmp_path, data):
    """No sum over ranks is behind them, and multiplying by two and dividing again rounds nothing; docs/tables.md."""
    one, two, three = (
        {key: row for part in on_ranks(world, one_step, data, str(tmp_path / str(world))) for key, row in part.items()}
        for world in (1, 2, 3)
    )
    once = [key for key, (_, count) in one.items() if count == 1]
    often = [key for key, (_, count) in one.items() if count > 20]
    assert len(once) > 30 and len(often) > 5
    for key in once:
        torch.testing.assert_close(two[key][0], one[key][0], rtol=0, atol=0)
    for key in often:
        torch.testing.assert_close(two[key][0], one[key][0], rtol=0, atol=1e-6)
    for key, (values, _) in one.items():
        torch.testing.assert_close(three[key][0], values, rtol=0, atol=1e-6)
