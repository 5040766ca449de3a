"""Steps in which a label is unknown in every row, on all ranks or on one of them: they learn what else there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.train.trainer import Trainer
from tests.ctr.train.funnel import funnel_table, options
from tests.ranks import on_ranks

OTHERS = "{name: buy, where: click}, {name: like, loss: pairwise}, {name: share, loss: jrc, mix: 0.3}"
LABELS = f"data.schema.labels=[click, {OTHERS}]"
CLICKS = "data.schema.labels=[click, {name: buy, weight: 0}, {name: like, weight: 0}, {name: share, weight: 0}]"
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "data"
    (folder / "train").mkdir(parents=True)
    for part in range(2):
        table, draw = funnel_table(150, part), np.random.default_rng(part)
        for name in ("like", "share"):
            table = table.append_column(name, pa.array((draw.random(150) < 0.4).astype(np.int8)))
        pq.write_table(table, folder / "train" / f"part-{part}.parquet", row_group_size=50)
    return folder


def trained(process, data: Path, run_dir: Path, divisor: str, labels: str, mask, *other: str):
    """Losses summed over ranks, the dense weights before and after, the rows of this rank, and the x of its batches.

    mask(batch, rank): which labels are known, bool [B, T]; None: all.
    """
    more = [labels, f"trainer.loss_divisor={divisor}", "optimizer.sparse.name=sgd", "data.lanes=2"]
    more += ["data.valid=null", "data.test=null", "trainer.batch_size=60", *other]
    trainer = Trainer(load_config(options(data, run_dir, "mmoe", *more), ""), process)
    before = {name: one.detach().clone() for name, one in trainer.engine.model.module.dense_parameters().items()}
    losses, seen = [], []
    for _, batch in zip(range(STEPS), trainer.readers["train"].epoch(0), strict=False):
        known = mask(batch, process.rank) if mask else None
        loss, _ = trainer.engine.train_step(replace(batch, known=known))
        loss = loss.detach().double()
        torch.distributed.all_reduce(loss)
        losses.append(float(loss))
        seen += batch.numeric[: batch.rows, 0].tolist()
    trainer.log.close()
    rows = {
        (name, int(one)): values
        for name, table in trainer.engine.tables.owned().items()
        for found in table.export_rows()
        for one, values in zip(found.ids, found.values, strict=True)
    }
    after = {name: one.detach() for name, one in trainer.engine.model.module.dense_parameters().items()}
    return losses, before, after, rows, seen


def nothing(batch, _rank):
    return torch.zeros_like(batch.labels, dtype=torch.bool)


def clicks(batch, _rank):
    return nothing(batch, 0) | (torch.arange(4) == 0)


def on_rank_1(batch, rank):
    return clicks(batch, rank) if rank else ~nothing(batch, rank)


def job(process, data: Path, folder: Path):
    """What is found with each divisor: where nothing is known, clicks alone, and on rank 1 clicks alone; and where
    clicks alone have a weight."""
    found = {}
    for divisor in ("batch", "task"):
        for name, labels, mask in [
            ("nothing", LABELS, nothing),
            ("clicks", LABELS, clicks),
            ("rank 1", LABELS, on_rank_1),
            ("weights", CLICKS, None),
        ]:
            run = folder / f"{name}-{divisor}-{process.world_size}".replace(" ", "-")
            found[name, divisor] = trained(process, data, run, divisor, labels, mask)
    return found


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    return on_ranks(2, job, data, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("divisor", ["batch", "task"])
def test_a_step_that_knows_no_label_moves_nothing(ranks, data, tmp_path, divisor):
    """Of rows, too: three steps leave them as they were made, as steps do that are too short to be seen."""
    (still,) = on_ranks(1, unmoved, data, tmp_path)
    of_ranks = {}
    for found in ranks:
        losses, before, after, rows, _ = found["nothing", divisor]
        assert losses == [0.0] * STEPS
        assert all(torch.equal(before[name], one) for name, one in after.items())
        of_ranks |= rows
    assert of_ranks.keys() == still.keys() and len(still) == 35
    assert all(torch.equal(row, still[key]) for key, row in of_ranks.items())


def unmoved(process, data: Path, folder: Path):
    """Rows after steps of a learning rate at which float32 stays as it is."""
    return trained(process, data, folder / "unmoved", "batch", LABELS, None, "optimizer.sparse.lr=1e-30")[3]


@pytest.mark.parametrize("divisor", ["batch", "task"])
def test_a_label_that_no_row_knows_leaves_the_others_their_gradients_bit_for_bit(ranks, divisor):
    for found in ranks:
        masked, alone = found["clicks", divisor], found["weights", divisor]
        assert masked[0] == alone[0] and all(0 < loss < 60 for loss in masked[0])
        assert all(torch.equal(alone[2][name], one) for name, one in masked[2].items())
        assert masked[3].keys() == alone[3].keys()
        assert all(torch.equal(row, alone[3][key]) for key, row in masked[3].items())


@pytest.mark.parametrize("divisor", ["batch", "task"])
def test_labels_that_one_rank_alone_does_not_know(ranks, process, data, tmp_path, divisor):
    """It is the step of one rank of the same rows, of which half are unknown."""
    of_rank_1 = torch.tensor(ranks[1]["rank 1", divisor][4])

    def half(batch, _rank):
        there = torch.isin(batch.numeric[:, 0], of_rank_1)
        assert 0 < int(there.sum()) < len(there)
        return ~there[:, None] | clicks(batch, 0)

    losses, _, after, rows, _ = trained(process, data, tmp_path / "alone", divisor, LABELS, half)
    for found in ranks:
        np.testing.assert_allclose(found["rank 1", divisor][0], losses, rtol=1e-5)
        for name, one in found["rank 1", divisor][2].items():
            torch.testing.assert_close(one, after[name], rtol=1e-4, atol=1e-6)
        for key, row in found["rank 1", divisor][3].items():
            torch.testing.assert_close(row, rows[key], rtol=1e-4, atol=1e-6)
