"""The page docs/python.md, executed as it stands, and what it does not show."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from tessera.ctr import api
from tests.ctr.train.states import arguments, write_data
from tests.ranks import ROOT, on_ranks


def run_page(process, folder: Path) -> None:
    """As in a fresh notebook: no process group."""
    dist.destroy_process_group()
    page = (ROOT / "docs" / "python.md").read_text()
    cells = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(cells) >= 5
    names = {"folder": folder}
    for cell in cells:
        exec(compile(cell, "docs/python.md", "exec"), names)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the harness ends it


def test_the_page_runs_as_it_stands(tmp_path):
    on_ranks(1, run_page, tmp_path)


def train_and_fail(process, data: Path, folder: Path) -> tuple[str, float, str]:
    dist.destroy_process_group()
    small = [one for one in arguments(data, folder / "run", "trainer.batch_size=100", "trainer.epochs=1")]
    with pytest.raises(api.TesseraError) as failed:
        api.train(api.load_config(*small, "data.train=nowhere"))
    held = failed.value  # as a notebook holds the last exception
    run = api.train(api.load_config(*small))
    with pytest.raises(api.TesseraError, match="holds no predictions of split 'test'"):
        run.predictions("test")
    with pytest.raises(api.TesseraError, match="is not empty"):
        api.train(api.load_config(*small))
    longer = api.train(api.load_config(*small, "trainer.epochs=2", "trainer.resume=auto"))
    scored = api.evaluate(longer.folder, "valid", output=folder / "scored").report["auc"]
    found = str(held), abs(scored - longer.report["auc"]), str(longer.predictions("valid").num_rows)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


def test_calls_follow_each_other_in_one_process(tmp_path):
    data = write_data(tmp_path / "data", 400)
    ((error, difference, rows),) = on_ranks(1, train_and_fail, data, tmp_path)
    assert "nowhere" in error and difference < 1e-9 and rows == "200"


def test_a_process_group_of_somebody_else_is_left_alone(tmp_path):
    data = write_data(tmp_path / "data", 100)
    on_ranks(1, refuse, data, tmp_path)


def refuse(process, data: Path, folder: Path) -> None:
    with pytest.raises(api.TesseraError, match="torch.distributed is in use in this process"):
        api.train(api.load_config(*arguments(data, folder / "run")))
    assert dist.is_initialized()


def test_a_folder_without_a_report_is_told(tmp_path):
    with pytest.raises(api.TesseraError, match="holds no report.json"):
        _ = api.Run(tmp_path).report
