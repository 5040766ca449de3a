"""Whatever happens to a folder of states, the newest complete one is found, and the message says what is wrong."""

import json
import os
import shutil
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tessera.distributed.saved import states as states_module
from tessera.distributed.saved.states import (
    CheckpointError,
    clean,
    discard,
    folder_name,
    latest,
    names_of_states,
    retain,
)
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableSaver
from tessera.embedding.table import DynamicTable
from tests.distributed.saved_tables import config, content, load_tables, save_tables, step


@pytest.fixture
def table() -> DynamicTable:
    return DynamicTable(config())


@pytest.fixture
def states(tmp_path, process, table) -> Path:
    """States of steps 1 and 2."""
    saver = TableSaver({"a": table})
    for number in (1, 2):
        step(table, number)
        save_tables(saver, Storage(tmp_path / "states"), folder_name(number), process, number)
    return tmp_path / "states"


def found(states: Path, process) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    saved = latest(Storage(states), process, warnings.append)
    return saved and saved.step, warnings


def newest_rows(states: Path) -> Path:
    return states / folder_name(2) / "rows" / "a" / "00000-of-00001.parquet"


def test_the_newest_is_found_and_holds_the_table(states, process, table):
    assert found(states, process) == (2, [])
    again = {"a": DynamicTable(config())}
    load_tables(again, states / folder_name(2), process)
    assert content(again, numbers=True) == content({"a": table}, numbers=True)
    assert not list(states.glob(".*"))


def truncate(states: Path) -> str:
    path = newest_rows(states)
    size = path.stat().st_size
    os.truncate(path, size - 7)
    return f"rows/a/00000-of-00001.parquet has {size - 7:,} bytes; the manifest says {size:,}"


def flip_a_bit(states: Path) -> str:
    path = newest_rows(states)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    return "rows/a/00000-of-00001.parquet has the checksum "


def lose_a_shard(states: Path) -> str:
    newest_rows(states).unlink()
    return "rows/a/00000-of-00001.parquet is missing"


def lose_the_dense_side(states: Path) -> str:
    shutil.rmtree(states / folder_name(2) / "dense")
    return "dense/00000-of-00001-000.safetensors is missing"


def lose_the_manifest(states: Path) -> str:
    (states / folder_name(2) / "manifest.json").unlink()
    return "it has no manifest: a save that did not end, or not a state"


def tear_the_manifest(states: Path) -> str:
    os.truncate(states / folder_name(2) / "manifest.json", 100)
    return "its manifest cannot be read: "


def change_the_manifest(states: Path) -> str:
    path = states / folder_name(2) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    return "its manifest was changed: its checksum does not match"


def come_from_the_future(states: Path) -> str:
    path = states / folder_name(2) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    return "it has format 99; this version reads 2"


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        lose_a_shard,
        lose_the_dense_side,
        lose_the_manifest,
        tear_the_manifest,
        change_the_manifest,
        come_from_the_future,
    ],
)
def test_a_damaged_state_is_passed_over(states, process, damage):
    problem = damage(states)
    step_found, (warning,) = found(states, process)
    assert step_found == 1
    assert warning.startswith(f"{states / folder_name(2)} is passed over: {problem}"), warning


def test_foreign_folders_and_half_saves_are_no_states(states, process):
    for name in (f".partial-{folder_name(9)}", "step-9", "notes", f".deleted-{folder_name(8)}"):
        (states / name).mkdir()
    (states / folder_name(7)).write_text("a file")
    step_found, (warning,) = found(states, process)
    assert step_found == 2 and folder_name(7) in warning
    clean(Storage(states))
    assert not list(states.glob(".*"))


def test_the_clock_has_no_say(states, process, table, monkeypatch):
    """It jumps back by 20 years before the state of step 3, whose files are then the oldest of all."""

    class Past(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=7300)

    monkeypatch.setattr(states_module, "datetime", Past)
    root = Storage(states)
    save_tables(TableSaver({"a": table}), root, folder_name(3), process, 3)
    written = [json.loads((states / folder_name(n) / "manifest.json").read_text())["written"] for n in (1, 2, 3)]
    assert written[2] < written[0]
    os.utime(states / folder_name(3), (0, 0))
    os.utime(states / folder_name(1), (2**32, 2**32))
    assert found(states, process) == (3, [])
    retain(root, 2)
    assert names_of_states(root) == [folder_name(3), folder_name(2)]


def test_a_state_that_did_not_verify_is_replaced(states, process, table):
    lose_a_shard(states)
    save_tables(TableSaver({"a": table}), Storage(states), folder_name(2), process, 2)
    assert found(states, process) == (2, [])


def test_the_newest_are_kept_and_torn_ones_do_not_count(states, process, table):
    root, saver = Storage(states), TableSaver({"a": table})
    save_tables(saver, root, folder_name(3), process, 3)
    (states / folder_name(3) / "manifest.json").unlink()
    retain(root, 1)
    assert found(states, process)[0] == 2
    assert folder_name(1) not in names_of_states(root)
    discard(root, folder_name(2))
    assert found(states, process)[0] is None


def full_disk(folder: Path) -> bool:
    """Mount a disk of 96 KiB, if we may."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk_leaves_the_state_before(tmp_path, process, table):
    states = tmp_path / "disk"
    if not full_disk(states):
        pytest.skip("no right to mount a small tmpfs; test_a_failing_write covers the rest")
    try:
        saver, root = TableSaver({"a": table}), Storage(states)
        step(table, 1)
        save_tables(saver, root, folder_name(1), process, 1)
        for number in range(2, 40):
            step(table, number)
        with pytest.raises(CheckpointError, match="rank 0: No space left on device; what was saved before") as error:
            save_tables(saver, root, folder_name(40), process, 40)
        assert "\n" not in str(error.value) and str(states / folder_name(40)) in str(error.value)
        assert found(states, process) == (1, [])
        assert not list(states.glob(".*"))
        subprocess.run(["mount", "-o", "remount,ro", str(states)], check=True)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            save_tables(saver, root, folder_name(41), process, 41)
        assert found(states, process) == (1, [])
    finally:
        subprocess.run(["umount", str(states)], check=True)


@pytest.mark.parametrize(
    "victim", ["rows/a", "dense/00000-of-00001-000.s", "dense/00000-of-00001.json", "training.json", "manifest.json"]
)
def test_a_failing_write_leaves_the_state_before(states, process, table, monkeypatch, victim):
    """The disk is full in the middle of one file, whichever."""
    write = Storage.write

    def failing(storage, path):
        if victim in path:
            raise OSError(28, "No space left on device")
        return write(storage, path)

    monkeypatch.setattr(Storage, "write", failing)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_tables(TableSaver({"a": table}), Storage(states), folder_name(3), process, 3)
    assert found(states, process) == (2, [])
    assert not list(states.glob(".*"))


def test_a_folder_that_cannot_be_made(tmp_path, process, table):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save_tables(TableSaver({"a": table}), Storage(tmp_path / "file" / "states"), folder_name(1), process, 1)


def test_behind_a_uri_the_manifest_comes_last(process, table):
    root, saver = Storage("memory://bucket/states"), TableSaver({"a": table})
    step(table, 1)
    save_tables(saver, root, folder_name(1), process, 1)
    before = content({"a": table})
    step(table, 2)
    save_tables(saver, root, folder_name(2), process, 2)
    saved = latest(root, process, print)
    assert saved.step == 2
    root.remove(f"{folder_name(2)}/manifest.json")  # a save that was killed
    warnings: list[str] = []
    saved = latest(root, process, warnings.append)
    assert saved.step == 1 and "no manifest" in warnings[0]
    again = {"a": DynamicTable(config())}
    load_tables(again, root.below(folder_name(1)), process)
    assert content(again) == before
    retain(root, 1)
    discard(root, folder_name(1))
    assert latest(root, process, warnings.append) is None
