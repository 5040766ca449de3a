"""A state is what its manifest lists, and a manifest that lies is refused in one line before anything is used."""

import json
import os
import shutil

import pytest

from tessera.distributed.rank import Process
from tessera.distributed.saved.compact import compact
from tessera.distributed.saved.inspect import _inspect
from tessera.distributed.saved.states import CheckpointError, clean, folder_name, latest, open_saved, retain
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableSaver
from tessera.embedding.errors import TesseraError
from tessera.embedding.table import DynamicTable
from tests.distributed.crafted import mutations, pickled, reseal, write_manifest
from tests.distributed.saved_tables import config, content, load_tables, save_tables, step
from tests.ranks import on_ranks

ROWS = "rows/a/00000-of-00001.parquet"


@pytest.fixture
def table() -> DynamicTable:
    return DynamicTable(config())


@pytest.fixture
def state(tmp_path, process, table):
    """A state that builds on another."""
    saver, chain = TableSaver({"a": table}), []
    for number in (1, 2):
        step(table, number)
        manifest = save_tables(saver, Storage(tmp_path), folder_name(number), process, number, chain)
        chain.append({"name": folder_name(number), "checksum": manifest["checksum"]})
    return tmp_path / folder_name(2)


def opened(state, process) -> None:
    load_tables({"a": DynamicTable(config())}, state, process)
    _inspect(Storage(state), None, None, 5, compacting=False, process=process)


def try_all(state, process, path, write) -> int:
    """How many wrong values in a JSON file are refused; those that are taken do no harm."""
    original, refused = json.loads(path.read_text()), 0
    for what, changed in mutations(original):
        write(changed)
        try:
            opened(state, process)
        except TesseraError as error:
            assert "\n" not in str(error), what
            refused += 1
    return refused


def test_wrong_values_in_a_manifest_are_one_line(state, process):
    path = state / "manifest.json"
    assert try_all(state, process, path, lambda changed: write_manifest(state, changed)) > 100


def test_wrong_values_in_the_description_of_tables_are_one_line(state, process):
    path = state / "training.json"

    def write(changed) -> None:
        path.write_text(json.dumps(changed))
        reseal(state)

    assert try_all(state, process, path, write) > 40


@pytest.mark.parametrize("text", ["null", "[]", "3", "{", "[" * 100_000, '"x"', "\xff"])
def test_files_that_hold_no_object_are_one_line(state, process, text):
    (state / "training.json").write_text(text)
    reseal(state)
    with pytest.raises(CheckpointError, match="training.json"):
        opened(state, process)
    (state / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest|format null"):
        opened(state, process)


@pytest.mark.parametrize("name", ["../secret", "/etc/hosts", "rows/../../secret", "a//b", "", "C:\\x", ".", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(state, process, tmp_path, name):
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((state / "manifest.json").read_text())
    for changed in (
        manifest | {"files": manifest["files"] | {name: {"bytes": 1, "crc32": 0}}},
        manifest | {"chain": [{"name": name, "checksum": "x"}]},
    ):
        write_manifest(state, changed)
        with pytest.raises(CheckpointError, match="expected (names of files inside the folder|a folder beside it)"):
            opened(state, process)


@pytest.mark.parametrize("linked", [ROWS, "rows/a", "rows", "training.json"])
def test_links_in_a_state_are_refused(state, process, tmp_path, linked):
    (state / linked).rename(tmp_path / "elsewhere")
    (state / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="it is a symbolic link, which states never hold"):
        opened(state, process)


def test_a_link_to_a_folder_of_states_is_fine(state, process, tmp_path, table):
    (tmp_path / "link").symlink_to(state.parent)
    again = {"a": DynamicTable(config())}
    load_tables(again, tmp_path / "link" / state.name, process)
    assert content(again) == content({"a": table})


def test_the_earlier_form_is_refused_and_not_unpickled(state, process, tmp_path):
    (state / "dense" / ".metadata").write_bytes(pickled(tmp_path / "marker"))
    manifest = json.loads((state / "manifest.json").read_text())
    write_manifest(state, manifest | {"format": 1})
    with pytest.raises(CheckpointError, match="it has format 1, of Tessera 0.1 before .* or train anew with this one"):
        opened(state, process)
    write_manifest(state, manifest)
    reseal(state, "dense/.metadata")
    opened(state, process)
    assert not (tmp_path / "marker").exists()


def test_files_beside_those_listed_are_not_seen(state, process, table, capsys, tmp_path):
    """Rows of a save by three ranks, a state inside, and a file of a kind that would mean something."""
    shutil.copyfile(state / ROWS, state / "rows" / "a" / "00002-of-00003.parquet")
    (state / "waiting" / "a").mkdir(parents=True)
    shutil.copyfile(state / ROWS, state / "waiting" / "a" / "00000-of-00001.parquet")
    shutil.copyfile(state / "dense/00000-of-00001.json", state / "dense/00001-of-00002.json")
    again = {"a": DynamicTable(config())}
    load_tables(again, state, process)
    assert content(again) == content({"a": table})
    assert _inspect(Storage(tmp_path), "a", None, 2, compacting=False, process=process) == 0
    said = capsys.readouterr().out
    assert f"{state.name}  has 3 file(s) beside what its manifest lists, ignored: dense/00001-of-00002.json" in said
    compact(Storage(tmp_path), open_saved(Storage(state), process), process)
    assert not open_saved(Storage(state), process).folders[0].strays()
    load_tables(again := {"a": DynamicTable(config())}, state, process)
    assert content(again) == content({"a": table})


def test_two_sets_of_rows_in_one_manifest_are_refused(state, process):
    shutil.copyfile(state / ROWS, state / "rows" / "a" / "00002-of-00003.parquet")
    reseal(state, "rows/a/00002-of-00003.parquet")
    with pytest.raises(CheckpointError, match="00002-of-00003.parquet; expected one file of each rank"):
        opened(state, process)


def save_part(process, root, number: int, *, killed: bool = False):
    """The rows of this rank after some steps; with `killed` the save does not come to its manifest."""
    table = DynamicTable(config())
    for one in range(1, number + 1):
        step(table, one, process.rank, process.world_size)
    storage, saver = Storage(root), TableSaver({"a": table})
    if killed:
        saver.take(delta=False).write(storage.below(folder_name(number)), process)
    else:
        save_tables(saver, storage, folder_name(number), process, number)
    return content({"a": table})["a"]


def test_fewer_ranks_save_where_three_were_killed_behind_a_uri(store, process):
    root = store.uri("states")
    for ranks in (1, 2):  # after a save by three ranks that was killed, in a folder without and with a state
        for rank in range(3):
            save_part(Process(rank, rank, 3, process.device, process.store), root, 5, killed=True)
        assert sum("of-00003" in name for name in store.objects()) == 3
        found = latest(Storage(root), process, lambda _: None)
        assert found is None if ranks == 1 else found.ranks == 1
        rows = {}
        parts = on_ranks(2, save_part, root, 5) if ranks == 2 else [save_part(process, root, 5)]
        for part in parts:
            rows |= part
        assert not [name for name in store.objects() if "of-00003" in name or ranks == 2 and "of-00001" in name]
        again = {"a": DynamicTable(config())}
        load_tables(again, Storage(root).below(folder_name(5)), process)
        assert content(again)["a"].keys() == rows.keys()
    retain(Storage(root), 1)
    assert latest(Storage(root), process, pytest.fail).step == 5


def test_a_killed_save_leaves_nothing_in_the_next_one(tmp_path, process, table):
    stray = tmp_path / f".partial-{folder_name(1)}" / "rows" / "a" / "00002-of-00003.parquet"
    stray.parent.mkdir(parents=True)
    stray.write_text("of a rank that was killed")
    save_tables(TableSaver({"a": table}), Storage(tmp_path), folder_name(1), process, 1)
    assert os.listdir(tmp_path) == [folder_name(1)]
    assert open_saved(Storage(tmp_path / folder_name(1)), process).folders[0].strays() == []


def test_what_a_killed_save_was_about_to_replace_comes_back(state, process):
    """Killed between two renames: the old one is aside, the new one has no name yet."""
    root = state.parent
    state.rename(root / f".replaced-{state.name}")
    shutil.copytree(root / f".replaced-{state.name}", root / f".partial-{state.name}")
    shutil.copytree(root / folder_name(1), root / f".replaced-{folder_name(1)}")
    clean(Storage(root))
    assert sorted(os.listdir(root)) == [folder_name(1), folder_name(2)]
    opened(state, process)
