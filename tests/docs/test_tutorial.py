"""The tutorial is followed from its first block to its last; what each step promises is there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.scripts.command import COMMANDS
from tests.docs.pages import ROOT, blocks
from tests.ranks import run_script

TEXT = (ROOT / "docs" / "tutorial.md").read_text()
#: What the reader's folder holds; in the test it lies elsewhere.
HIS = re.compile(r"(?<![\w/])(data/shop|my_conf|runs/shop|served/shop)")


def commands() -> list[list[str]]:
    """The words of all commands, in order."""
    lines = "\n".join(blocks(TEXT, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def understood(words: list[str]) -> tuple[str, list[str], int]:
    """The script that a command starts, its arguments, and on how many ranks."""
    if words[0] == "tessera":
        return COMMANDS[words[1]][0], words[2:], 1
    launcher, option, number, module, name, *arguments = words
    assert (launcher, option, module) == ("torchrun", "--nproc-per-node", "-m")
    return name.removeprefix("tessera.scripts."), arguments, int(number)


def run(words: list[str], folder: Path) -> str:
    """Run a command with the reader's files in the folder. Returns what it said; an error if it failed."""
    script, arguments, world = understood(words)
    moved = [HIS.sub(rf"{folder}/\1", one) for one in arguments]
    done = run_script(f"scripts/{script}.py", *moved, world=world)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_every_block_is_of_a_kind_that_is_run():
    languages = re.findall(r"^```(\w+)$", TEXT, re.MULTILINE)
    assert set(languages) == {"text", "python", "yaml", "sh"}
    assert languages.count("python") == languages.count("yaml") == 1 and len(commands()) >= 9


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The folder of a reader who has saved the blocks, and run the one that makes data."""
    folder = tmp_path_factory.mktemp("reader")
    (script,) = blocks(TEXT, "python")
    exec(HIS.sub(rf"{folder}/\1", script), {"__name__": "__main__"})
    (description,) = blocks(TEXT, "yaml")
    (folder / "my_conf" / "data").mkdir(parents=True)
    (folder / "my_conf" / "data" / "shop.yaml").write_text(HIS.sub(rf"{folder}/\1", description))
    return folder


def test_every_configuration_is_understood(reader):
    """Those of all commands that take overrides alone."""
    of_keys = [understood(words) for words in commands() if understood(words)[0] in ("train", "daily")]
    assert len(of_keys) >= 6
    for _, arguments, _ in of_keys:
        moved = [HIS.sub(rf"{reader}/\1", one) for one in arguments if one != "--cfg"]
        config = load_config(moved, "")
        assert Schema(config.data.schema).tables.keys() == {"user", "item", "category", "tags"}


def test_the_first_training_ends_in_its_report(reader, tmp_path):
    (reader / "first").mkdir()
    for name in ("data", "my_conf"):
        (reader / "first" / name).symlink_to(reader / name)
    run([*commands()[1], "trainer.max_steps=5"], reader / "first")
    assert json.loads((reader / "first/runs/shop/report.json").read_text())["rows"] == 2000


@pytest.fixture(scope="module")
def followed(reader) -> tuple[Path, list[str]]:
    """The folder of a reader who has followed all, and what each command said."""
    return reader, [run(words, reader) for words in commands()]


@pytest.mark.slow
def test_it_makes_what_it_says(followed):
    folder, said = followed
    for name in re.findall(r"^(runs/shop/\S+)", TEXT, re.MULTILINE):
        assert (folder / name).exists(), name
    report = json.loads((folder / "runs/shop/report.json").read_text())
    assert report["split"] == "test" and report["rows"] == 2000 and report["auc"] > 0.6
    other = json.loads((folder / "runs/shop-on-the-8th/report.json").read_text())
    assert other["rows"] == 2000 and (folder / "runs/shop-daily/index.html").exists()
    assert "dt" in said[0] and "AUC" in said[4]


@pytest.mark.slow
def test_days_go_on_and_back(followed):
    folder, _ = followed
    days = [json.loads(line) for line in (folder / "runs/shop-daily/days.jsonl").read_text().splitlines()]
    assert [day["partition"] for day in days] == [f"2026-11-0{day}" for day in range(1, 8)]
    assert all(day["status"] == "trained" for day in days) and days[0]["published"] == "full"
    assert days[1]["published"] == "delta" and sum(day["tables"]["expired"] for day in days) > 0
    rows = pq.read_table(folder / "served/shop/rows/item")
    assert 0 < len(rows) <= 200


def test_each_step_names_its_files():
    for name in ("my_conf/data/shop.yaml", "make_shop.py", "runs/shop-daily/days.jsonl"):
        assert f"`{name}`" in TEXT
