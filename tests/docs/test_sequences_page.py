"""The page of sequences is followed from its log to its daily job; the schema that it shows is one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tests.docs.pages import ROOT, blocks
from tests.ranks import run_script

TEXT = (ROOT / "docs" / "sequences.md").read_text()
HIS = re.compile(r"(?<![\w/])(data/log|data/shop|my_conf|runs/shop)")


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    (script,) = blocks(TEXT, "python")
    exec(HIS.sub(rf"{folder}/\1", script), {"__name__": "__main__"})
    (folder / "my_conf" / "data").mkdir(parents=True)
    (folder / "my_conf" / "data" / "shop.yaml").write_text(HIS.sub(rf"{folder}/\1", blocks(TEXT, "yaml")[1]))
    return folder


def test_the_schema_that_it_shows_is_one():
    schema = Schema.from_config(yaml.safe_load(blocks(TEXT, "yaml")[0]))
    assert [one.name for one in schema.sequences["history"]][-1] == "history_seconds_ago"
    assert schema.tables["item"] == ["item", "history_item"]


def test_the_benchmark_has_the_published_settings():
    config = load_config(["experiment=hstu_benchmark"], "")
    assert [config.model[key] for key in ("layers", "heads", "qk_dim", "v_dim", "width")] == [3, 4, 128, 128, 512]
    dense = config.optimizer.dense
    assert (
        config.trainer.batch_size == 8192
        and dense.warmup_steps == 24_000
        and (dense.beta1, dense.beta2) == (0.95, 0.999)
    )


@pytest.mark.slow
def test_it_goes_from_a_log_to_a_daily_job(reader):
    for line in "\n".join(blocks(TEXT, "sh")).replace("\\\n", " ").splitlines():
        if line.strip():
            _, command, *arguments = shlex.split(line)
            moved = [HIS.sub(rf"{reader}/\1", one) for one in arguments]
            done = run_script(f"scripts/{command}.py", *moved, timeout=300)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    days = [json.loads(line) for line in (reader / "runs/shop/days.jsonl").read_text().splitlines()]
    assert len(days) == 4 and all(day["status"] == "trained" for day in days)
    assert days[0]["tasks"]["clicked"]["auc"] == 0.5 and days[-1]["tasks"]["clicked"]["auc"] > 0.6
    assert days[-1]["tasks"]["bought"]["rows"] == days[-1]["tasks"]["clicked"]["positives"]
    assert (reader / "runs/shop/index.html").exists()
