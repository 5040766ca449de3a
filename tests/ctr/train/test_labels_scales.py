"""ALPT's second pass with several labels: scales learn from the sum of their losses, and from no row that does not
count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.tables import owned_tables
from tests.ctr.train.funnel import funnel_table, options

STEPS = 6
# A dense side that stays: its gradients would be those of other heads.
STILL = ["optimizer.dense.lr=1e-30", "optimizer.sparse.name=rowwise_adagrad", "optimizer.sparse.lr=0.05"]
INT8 = ["embedding.format=int8", "embedding.alpt.every=1", "embedding.alpt.lr=0.05", "embedding.init_std=0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("scales") / "data", np.random.default_rng(0)
    table = funnel_table(40 * STEPS, 0)
    table = table.append_column("never", pa.nulls(len(table), pa.int8()))
    table = table.append_column("some", pa.array(draw.integers(0, 2, len(table)), mask=draw.random(len(table)) < 0.5))
    (folder / "train").mkdir(parents=True)
    pq.write_table(table, folder / "train" / "part-0.parquet")
    return folder


def trained(
    process, data: Path, run_dir: Path, labels: str
) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """(table, id) -> values and scale, of a net whose heads are all those of the first label."""
    more = ["data.valid=null", "data.test=null", "trainer.batch_size=40", f"data.schema.labels={labels}"]
    command = options(data, run_dir, "dnn", "model.dropout=0.0", *more, *STILL, *INT8)
    trainer = Trainer(load_config(command, ""), process)
    last = [one for one in trainer.engine.network.tower.modules() if isinstance(one, torch.nn.Linear)][-1]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        last.weight.copy_(torch.randn(1, last.in_features, generator=generator).expand_as(last.weight))
        last.bias.zero_()
    for batch in trainer.readers["train"].epoch(0):
        trainer.engine.train_step(batch)
    trainer.log.close()
    found = {}
    for name, table in owned_tables(trainer.engine.tables).items():
        for rows in table.export_rows():
            for place, i in enumerate(rows.ids.tolist()):
                found[name, i] = table.gather(rows.rows[place : place + 1])[0], rows.scale[place]
    return found


def far(mine: dict, other: dict) -> float:
    """How far apart scales are, at most, as a share of their size."""
    return max(float((mine[key][1] / other[key][1] - 1).abs().max()) for key in other)


def test_scales_learn_from_the_sum_of_the_labels(process, data, tmp_path):
    """Two labels that are one, of weight 1/2 each, and a label that never counts, leave the scales of one label."""
    one = trained(process, data, tmp_path / "one", "[click]")
    sizes = torch.stack([size for _, size in one.values()])
    assert float(sizes.max() / sizes.min()) > 1.1, "scales have learnt"
    for name, labels in {
        "halves": "[{name: a, column: click, weight: 0.5}, {name: b, column: click, weight: 0.5}]",
        "never": "[click, {name: never, weight: 7}]",
    }.items():
        found = trained(process, data, tmp_path / name, labels)
        assert found.keys() == one.keys()
        assert far(found, one) < 1e-4, name
        for key, (values, size) in one.items():  # a sum in another order now and then rounds to the next step
            assert float((found[key][0] - values).abs().max()) <= 1.01 * float(size.max()), (name, key)
    other = trained(process, data, tmp_path / "other", "[click, {name: some, weight: 7}]")
    assert far(other, one) > 0.01, "a label that counts moves them"
