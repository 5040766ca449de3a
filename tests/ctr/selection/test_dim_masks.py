"""Masks over columns: what they multiply, what they learn, and the dims of tables that come out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.models.numeric import ScaledVectors
from tessera.ctr.selection.dim_masks import DimMasks
from tessera.ctr.selection.table_sizes import overrides_of
from tessera.embedding.errors import ConfigError
from tests.ctr.selection.fields import fields_with, schema_with
from tests.ranks import on_ranks

DIMS = {"v": 6, "w": 1}


def made(sequences: bool = False, **changes) -> DimMasks:
    schema = schema_with(sequences)
    given = {"block": 4, "lr": 0.1, "pull": 0.5} | changes
    return DimMasks(schema.tables, fields_with(schema, ScaledVectors), DIMS, **given)


def test_masks_multiply_blocks_of_the_widest_groups_alone():
    gates = made()
    assert gates.tables == ("a", "items", "bag")
    gates.learned.copy_(torch.tensor([[1.0, 0.5], [0.25, 0.0], [2.0, 3.0]]))
    vectors, weights = torch.ones(2, 3, 6), torch.ones(2, 3, 1)
    gates.begin_pass((torch.ones(2, 3), {}))
    expected = torch.tensor([[1.0] * 4 + [0.5] * 2, [0.25] * 4 + [0.0] * 2, [2.0] * 4 + [3.0] * 2])
    torch.testing.assert_close(gates("v", 3, vectors, None), expected.expand(2, 3, 6))
    assert torch.equal(gates("w", 3, weights, None), weights)
    assert torch.equal(gates("numeric 0", 0, vectors, None), vectors)
    with gates.learning(0, 0) as learned:
        gates.begin_pass((torch.ones(2, 3), {}))
        (gradient,) = torch.autograd.grad(gates("v", 3, vectors, None).sum(), learned)
    assert gradient.tolist() == [[8, 4]] * 3  # rows times columns
    gates.learn(torch.zeros(3, 2))
    assert gates.learned[1, 1] == 0 and gates.learned[0, 0] == pytest.approx(0.9)  # L1 pulls, and stops at 0
    gates.learned.copy_(torch.tensor([[1.0, 0.5], [0.25, 0.0], [0.9, 0.8]]))
    assert gates.dims(0.6) == {"a": 4, "items": 4, "bag": 6}
    assert overrides_of(gates, 0.6) == ["embedding.tables.a.dim=4", "embedding.tables.items.dim=4"]


def test_a_table_that_is_read_event_by_event_has_no_mask():
    gates = made(sequences=True)
    assert gates.tables == ("a", "bag")
    gates.learned.zero_()
    vectors = torch.ones(2, 3, 6)
    gates.begin_pass((torch.ones(2, 3), {}))
    assert gates("v", 3, vectors, None)[0].sum(1).tolist() == [0, 6, 0]


def test_a_mistake_is_one_line():
    with pytest.raises(ConfigError, match="selection.block is 6; expected less than 6, the dim of the tower"):
        made(block=6)
    for override, message in (
        ("embedding=static", "embedding.kind is static; expected dynamic tables"),
        ("embedding.tables.a.dim=2", "embedding.tables.a.dim is set; expected dynamic tables"),
        ("data.valid=null", "selection.method is dnis, which learns on data.valid, and it is null"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(["selection.method=dnis", override], "")


def write_signal(folder: Path) -> None:
    """Column a says much, b nothing."""
    drawn = np.random.default_rng(3)
    weights = drawn.normal(size=500)
    for split, rows in (("train", 20_000), ("valid", 10_000)):
        ids = {name: drawn.integers(0, 500, rows) for name in "ab"}
        label = (drawn.random(rows) < 1 / (1 + np.exp(-2 * weights[ids["a"]]))).astype(np.int8)
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table({"label": label, **ids}), folder / split / "part.parquet", row_group_size=2000)


def search(process, folder: Path, name: str, *overrides: str) -> None:
    from tessera.ctr.train.trainer import Trainer

    fixed = ["model=dnn", "data=synthetic", "data.schema.features=[{name: a}, {name: b}]", "data.test=null"]
    fixed += ["data.schema.time=null", f"data.path={folder / 'data'}", "trainer.device=cpu", "trainer.threads=1"]
    fixed += [
        "model.hidden=[16]",
        "model.embedding_dim=8",
        "trainer.batch_size=500",
        f"trainer.run_dir={folder / name}",
    ]
    Trainer(load_config([*fixed, "trainer.epochs=3", "optimizer.dense.lr=0.005", *overrides], ""), process).fit()


@pytest.mark.slow
def test_a_table_without_signal_gets_the_smallest_dim_on_one_and_two_ranks(tmp_path):
    write_signal(tmp_path / "data")
    told = {}
    for world in (1, 2):
        masks = ["selection.method=dnis", "selection.every=1", "selection.lr=0.03", "selection.block=2"]
        on_ranks(world, search, tmp_path, f"on-{world}", *masks, "selection.pull=0.001", "trainer.eval_every=120")
        folder = tmp_path / f"on-{world}" / "importance" / "dnis"
        told[world] = json.loads((folder / "sizes.json").read_text())
        ranked = json.loads((folder / "importance.json").read_text())
        assert [one["name"] for one in ranked["fields"]] == ["a", "b"]
    for one, two in zip(told[1]["tables"], told[2]["tables"], strict=True):
        assert one["masks"] == pytest.approx(two["masks"], abs=0.02)
        assert (one["rows"], two["rows"]) == (500, 500)
    a, b = told[1]["tables"]
    assert b["dim"] == 2 < a["dim"], told
    assert (b["bytes"], b["bytes_before"]) == (500 * 2 * 4, 500 * 8 * 4)
    assert told[1]["bytes"] == a["bytes"] + b["bytes"] < told[1]["bytes_before"]
    on_ranks(1, search, tmp_path, "narrow", *told[1]["overrides"])
    assert json.loads((tmp_path / "narrow" / "report.json").read_text())["auc"] > 0.7
