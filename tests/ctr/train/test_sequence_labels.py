"""Models of sequences over several labels with very different numbers of positives: one curve on 1, 2 and 3 ranks,
through kills and another number of ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ctr.train.states import metrics_of, newest, rows_of_state
from tests.ctr.train.test_resume import trained as run
from tests.ctr.train.test_sequences import MODELS, ROWS, arguments, write

LABELS = "data.schema.labels=[label, {name: bought, where: label, weight: 2}, {name: rare, loss: focal}]"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """About half of the rows are positive, a tenth of these, and one row in a hundred, most of them in one file's end;
    some are unknown."""
    folder, draw = write(tmp_path_factory.mktemp("uneven") / "data"), np.random.default_rng(7)
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path)
        bought = (table["label"].to_numpy() == 1) & (draw.random(ROWS) < 0.1)
        rare = (np.arange(ROWS) > ROWS - 60) & (draw.random(ROWS) < 0.06)
        rare[-1] = True
        unknown = draw.random(ROWS) < 0.2
        unknown[-1] = False
        table = table.append_column("bought", pa.array(bought.astype(np.int8), mask=unknown))
        table = table.append_column("rare", pa.array(rare.astype(np.int8), mask=unknown))
        pq.write_table(table, path, row_group_size=40, write_page_checksum=True)
    return folder


def job(data: Path, run_dir: Path, model: str) -> list[str]:
    states = ["trainer.checkpoint.every=3", "trainer.checkpoint.full_every=3", "trainer.resume=auto"]
    steps = [
        "trainer.epochs=2",
        "trainer.log_every=1",
        "optimizer.sparse.name=sgd",
        "trainer.early_stop.metric=label.auc",
    ]
    return arguments(data, run_dir, *MODELS[model], LABELS, *states, *steps)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bst", "dien"])
def test_ranks_have_one_curve_and_a_killed_run_goes_on_with_more_of_them(ranks, uneven, tmp_path, model):
    for world in (1, 2, 3):
        run(ranks, world, job(uneven, tmp_path / f"{world}", model), tmp_path)
    command = job(uneven, tmp_path / "parts", model)
    run(ranks, 2, command, tmp_path, -signal.SIGKILL, (8, signal.SIGKILL, [0, 1]))
    assert "goes on from" in run(ranks, 3, command, tmp_path)
    lines = {name: metrics_of(tmp_path / name) for name in ("1", "2", "3", "parts")}
    losses = {name: [one["loss"] for one in found if one["kind"] == "train"] for name, found in lines.items()}
    assert len(losses["1"]) == 22
    for name in ("2", "3", "parts"):
        assert losses[name] == pytest.approx(losses["1"], rel=1e-4), name
    tables = {name: rows_of_state(newest(tmp_path / name), numbers=False) for name in lines}
    for name, found in tables.items():
        assert found.keys() == tables["1"].keys()
        for table, rows in tables["1"].items():
            counts = {one: row["count"] for one, row in rows.items()}
            assert {one: row["count"] for one, row in found[table].items()} == counts, (name, table)
