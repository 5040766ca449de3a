"""The recommendation benchmark's order, train a day and evaluate the next, in its shape scaled down."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.convert.pipeline import schema_from_conf
from tessera.ctr.data.synthetic_histories import HistoriesConfig, write_histories
from tests.ctr.daily.days import assert_same_life, key_of, records, served
from tests.ctr.train.warm_ranks import WarmRanks
from tests.docs.pages import ROOT

DAYS, ROWS, LENGTH = 2, 90, 12
SMALLER = ["width=8", "embedding_dim=4", "qk_dim=4", "v_dim=4", "preprocessor=8", "head_hidden=8"]


def command_of_the_page() -> list[str]:
    """What docs/sequences.md says of the same job on a small machine."""
    page = (ROOT / "docs" / "sequences.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"tessera daily (experiment=hstu_benchmark .*)", page)
    return shlex.split(line)


def job(data: Path, run_dir: Path) -> list[str]:
    place = [f"data.path={data}", f"trainer.run_dir={run_dir}", "trainer.device=cpu", "trainer.threads=1"]
    feature = ["trainer.batch_size=18", f"data.schema.features={shorter()}", *(f"model.{one}" for one in SMALLER)]
    states = ["trainer.checkpoint.every=2", "trainer.checkpoint.full_every=2", "daily.bands.window=0"]
    less = ["embedding.rows=200", "daily.report=false", "export.published=false"]
    return [*command_of_the_page(), *place, *feature, *states, *less]


def shorter() -> str:
    """The features of the benchmark's data with histories of at most LENGTH events, less than some rows have."""
    features = schema_from_conf("synthetic_histories")["features"]
    made = [one | ({"max_length": LENGTH} if one["kind"] == "sequence" else {}) for one in features]
    return json.dumps(made).replace('"', "")


@pytest.mark.slow
def test_days_are_trained_and_evaluated_in_turn_through_kills(tmp_path):
    data, output, ranks = tmp_path / "data", tmp_path / "output", WarmRanks("daily")
    write_histories(HistoriesConfig(ROWS * DAYS, days=DAYS, length=20, users=30, items=5), data, Writing(30))
    days = sorted(path.name for path in data.glob("day=*"))
    assert len(days) == DAYS
    try:
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        assert ranks.run(1, job(data, whole), output) == [0], output.read_text()
        assert ranks.run(1, job(data, killed), output, end=(8, signal.SIGKILL, [0])) == [-9], output.read_text()
        assert len(records(killed)) == 1, "it was killed inside the second day"
        assert ranks.run(1, job(data, killed), output) == [0], output.read_text()
    finally:
        ranks.close()
    assert_same_life(killed, whole)
    first, second = records(whole)
    assert [first["partition"], second["partition"]] == [key_of(day) for day in range(DAYS)] == served(whole)["chain"]
    assert second["step"] == 10 and second["rows"] == ROWS
    found = pq.read_table(whole / "days" / key_of(1) / "predictions", partitioning=None)
    stored = pq.read_table(data / days[1], partitioning=None)
    assert sorted(found["label"].to_pylist()) == sorted(stored["label"].to_pylist()), "each row of the day once"
    assert np.std(found["prediction"].to_numpy()) > 0
