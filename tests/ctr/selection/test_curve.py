"""Training again on the best k fields: with all of them the run is the same to the bit, others are not even read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tessera.ctr.config import load_config
from tessera.ctr.report.curve_page import curve_page
from tessera.ctr.runs.score import run_config
from tessera.ctr.selection.curve import counts_of, run_curve
from tessera.ctr.selection.result import Importance, write_result
from tessera.embedding.errors import ConfigError
from tests.ctr.report.html_page import check_page
from tests.ctr.train.states import arguments, assert_same_end, write_data
from tests.ranks import on_ranks


def train_and_curve(process, folder: Path) -> None:
    from tessera.ctr.train.trainer import Trainer

    job = arguments(folder / "data", folder / "run", "trainer.batch_size=100", "embedding.tables.d.ttl_days=30")
    Trainer(load_config(job, ""), process).fit()
    run, method = folder / "run", "dropout"
    with pytest.raises(ConfigError, match="--method dropout ranks while a model is trained"):
        run_curve(run_config(run, []), process, run, method, [1])
    ranking = [Importance((name,), value, None, None) for name, value in (("c", 3.0), ("x", 2.0), ("d", 1.0))]
    write_result(run / "importance" / method, {"method": method, "meaning": "made up"}, ranking)
    with pytest.raises(ConfigError, match="not of this run's fields: row is in one of them alone"):
        run_curve(run_config(run, []), process, run, method, [1])
    ranking.append(Importance(("row",), 0.0, None, None))
    write_result(run / "importance" / method, {"method": method, "meaning": "made up"}, ranking)
    with pytest.raises(ConfigError, match="--curve 5: the run has 4 fields; expected from 1 to 4"):
        run_curve(run_config(run, []), process, run, method, [2, 5])
    run_curve(run_config(run, []), process, run, method, [4])
    for split in ("train", "valid"):
        path = folder / "data" / split / "part.parquet"
        pq.write_table(pq.read_table(path).drop(["row", "d"]), path, row_group_size=15)
    run_curve(run_config(run, []), process, run, method, [4, 2])


@pytest.mark.slow
def test_all_fields_are_the_run_itself_and_columns_of_the_others_are_not_read(tmp_path):
    write_data(tmp_path / "data", 300, 100)
    on_ranks(1, train_and_curve, tmp_path)
    target = tmp_path / "run" / "importance" / "dropout-curve"
    assert_same_end(target / "best-4", tmp_path / "run")
    told = json.loads((target / "curve.json").read_text())
    assert [point["fields"] for point in told["points"]] == [2, 4]  # the run on 4 was kept, as its columns are gone
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert told["points"][1]["splits"]["valid"]["auc"] == report["auc"] != told["points"][0]["splits"]["valid"]["auc"]
    page = check_page(curve_page(told, "curve.json"))
    assert "svg" in {tag for tag, _ in page.tags} and (target / "curve.html").exists()


def test_counts_are_numbers():
    assert counts_of("5,10, 20") == [5, 10, 20]
    with pytest.raises(ConfigError, match="--curve '5;10'; expected numbers of fields, as 5,10,20"):
        counts_of("5;10")
