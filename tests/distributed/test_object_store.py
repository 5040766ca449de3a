"""Folders of states behind the S3 protocol: no rename, and objects of ranks that were killed remain."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from tessera.distributed.saved.states import (
    CheckpointError,
    clean,
    discard,
    folder_name,
    latest,
    names_of_states,
    retain,
)
from tessera.distributed.saved.storage import REMOTE_BUFFER_BYTES, Sealed, Storage, seal
from tessera.distributed.saved.tables import TableSaver
from tessera.embedding.table import DynamicTable
from tests.distributed.saved_tables import config, content, load_tables, save_tables, step
from tests.object_store import ObjectStore


def test_files_are_written_read_listed_and_removed(store: ObjectStore):
    folder = Storage(store.uri("runs/x"))
    assert not folder.local and folder.names() == [] and not folder.exists("a")
    large = bytes(range(256)) * 50_000  # more than one part of an upload, and than one request of a reader
    for name, value in (("a", b"abc"), ("deep/er/b=1 %41", b""), ("deep/large", large)):
        with folder.write(name) as stream:
            stream.write(value)
        assert folder.read(name) == value and store.get(f"runs/x/{name}") == value
        assert folder.written[name] == seal(value) and folder.problem(name, seal(value)) is None
    assert folder.names() == ["a", "deep"] and folder.names("deep") == ["er", "large"] and folder.names("a") == []
    assert store.objects("runs") == ["runs/x/a", "runs/x/deep/er/b=1 %41", "runs/x/deep/large"]
    assert folder.all_files() == ["a", "deep/er/b=1 %41", "deep/large"]
    assert folder.below("deep").all_files() == ["er/b=1 %41", "large"] and folder.below("no").all_files() == []
    with folder.open("deep/large") as file:
        file.seek(-7, 2)
        assert file.read() == large[-7:]
        file.seek(REMOTE_BUFFER_BYTES - 3)
        assert file.read(9) == large[REMOTE_BUFFER_BYTES - 3 :][:9]
    assert "is missing" in folder.problem("deep/no", seal(b""))
    assert "bytes; the manifest says" in folder.problem("a", Sealed(4, 0))
    folder.remove("deep")
    folder.remove("never")
    folder.remove("a")
    assert store.objects() == []


def test_states_are_saved_found_kept_and_discarded(store: ObjectStore, process):
    table, root = DynamicTable(config()), Storage(store.uri("states"))
    saver, chain = TableSaver({"a": table}), []
    for number in range(1, 6):
        step(table, number)
        chain = [] if number in (1, 4) else chain
        manifest = save_tables(saver, root, folder_name(number), process, number, chain)
        chain = [*chain, {"name": folder_name(number), "checksum": manifest["checksum"]}]
    assert names_of_states(root) == [folder_name(number) for number in (5, 4, 3, 2, 1)]
    again = {"a": DynamicTable(config())}
    load_tables(again, root.below(folder_name(5)), process)
    assert content(again) == content({"a": table})
    retain(root, 1)
    assert names_of_states(root) == [folder_name(5), folder_name(4)]
    assert {name.split("/")[1] for name in store.objects()} == {folder_name(5), folder_name(4)}
    discard(root, folder_name(5))
    assert latest(root, process, print).step == 4


def test_objects_of_a_killed_save_are_no_state(store: ObjectStore, process):
    table, root, said = DynamicTable(config()), Storage(store.uri("states")), []
    step(table, 1)
    for number in (1, 2):
        save_tables(TableSaver({"a": table}), root, folder_name(number), process, number)
    store.delete(f"states/{folder_name(2)}/manifest.json")
    assert latest(root, process, said.append).step == 1
    assert "it has no manifest: a save that did not end" in said[0] and folder_name(2) in said[0]
    clean(root)
    save_tables(TableSaver({"a": table}), root, folder_name(2), process, 2)
    assert latest(root, process, said.append).step == 2 and len(said) == 1


def save_again(root: Storage, table: DynamicTable, process, monkeypatch, fault: type[BaseException]) -> None:
    """Save step 1 again, with the fault behind its first file."""
    write = Storage.write

    @contextmanager
    def write_then_fail(storage, path):
        with write(storage, path) as stream:
            yield stream
        if path.startswith("rows/"):
            raise fault(28, "No space left on device")

    monkeypatch.setattr(Storage, "write", write_then_fail)
    with pytest.raises(CheckpointError if fault is OSError else fault):
        save_tables(TableSaver({"a": table}), root, folder_name(1), process, 1)
    monkeypatch.setattr(Storage, "write", write)


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
def test_a_state_that_is_saved_again_is_there_until_the_new_one_is(store: ObjectStore, process, monkeypatch, fault):
    """A run over days saves its last step again with the day's record. KeyboardInterrupt: nothing is tidied."""
    table, root = DynamicTable(config()), Storage(store.uri("states"))
    step(table, 1)
    before = content({"a": table})
    save_tables(TableSaver({"a": table}), root, folder_name(1), process, 1)
    step(table, 2)
    save_again(root, table, process, monkeypatch, fault)
    if fault is KeyboardInterrupt:
        assert latest(root, process, lambda _: None) is None
        clean(root)
    again = {"a": DynamicTable(config())}
    load_tables(again, root.below(folder_name(1)), process)
    assert content(again) == before and root.names() == [folder_name(1)]
    save_tables(TableSaver({"a": table}), root, folder_name(1), process, 1)
    again = {"a": DynamicTable(config())}
    load_tables(again, root.below(folder_name(1)), process)
    assert content(again) == content({"a": table}) and root.names() == [folder_name(1)]


def test_a_bucket_that_is_not_there_is_named(store: ObjectStore, process):
    root = Storage(store.uri("states").replace("bucket/", "nobucket/"))
    table = DynamicTable(config())
    with pytest.raises(CheckpointError, match="cannot be written: rank 0: .*NO_SUCH_BUCKET"):
        save_tables(TableSaver({"a": table}), root, folder_name(1), process, 1)


@pytest.mark.parametrize("where", ["local", "memory://all-files"])
def test_all_files_below_a_folder_are_listed_anywhere(tmp_path, where):
    folder = Storage(tmp_path / "x" if where == "local" else where)
    assert folder.all_files() == []
    for name in ("b", "a/c", "a/d e/f"):
        with folder.write(name) as stream:
            stream.write(b"1")
    assert folder.all_files() == ["a/c", "a/d e/f", "b"]
    if where == "local":
        (tmp_path / "x" / "loop").symlink_to(tmp_path)
        (tmp_path / "x" / "broken").symlink_to(tmp_path / "nowhere")
        assert folder.all_files() == ["a/c", "a/d e/f", "b", "broken", "loop"]
