"""A served model is whole, checked and nobody else's, whatever happens to it or to what is published."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest

from tessera.ctr.daily.latest import read_latest
from tessera.ctr.daily.serve import apply, is_served
from tessera.distributed.folder_lock import FolderInUse, FolderLock
from tessera.distributed.saved import states
from tessera.distributed.saved.manifest import CheckpointError, checksum
from tessera.distributed.saved.states import open_saved
from tessera.distributed.saved.storage import Storage
from tessera.embedding.errors import ConfigError, TesseraError
from tests.ctr.daily.publications import Publications, published
from tests.ctr.test_output_folders import tree
from tests.ctr.train.states import rows_of_state, tensors_of_state
from tests.distributed.saved_tables import alone
from tests.ranks import _context


@pytest.fixture
def days(tmp_path) -> Publications:
    """A whole model and two days of changes in tmp_path/run/published."""
    return published(tmp_path / "run" / "published", "full", "delta", "delta")


def serve(days: Publications, output: Path, wait_seconds: float = 0.0) -> str:
    return apply(days.root.name, output, days.process, wait_seconds)


def flip(path: Path, place: int, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_latest_with_any_bit_flipped_or_cut_anywhere_is_one_line(days, tmp_path):
    latest = tmp_path / "run" / "published" / "latest"
    whole, meant = latest.read_bytes(), read_latest(days.root)
    damaged = [whole[:n] for n in range(0, len(whole) - 2, 3)]
    for place in range(len(whole)):
        damaged += [whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :] for bit in range(8)]
    for content in damaged:
        latest.write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            read_latest(days.root)
        assert "latest is damaged: " in str(raised.value) and "\n" not in str(raised.value)
        assert str(raised.value).endswith("start the run's `tessera daily` again, which writes it anew")
    latest.write_bytes(whole)
    assert read_latest(days.root) == meant


LINK = {"name": "2026-01-03", "checksum": "00000000"}
GOOD = {"partition": "2026-01-03", "step": 3, "chain": [LINK]}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({}, "it has no '"),
        ([], "expected an object"),
        (None, "expected an object"),
        ("latest", "expected an object"),
        (7, "expected an object"),
        (GOOD | {"chain": []}, "its chain is []"),
        (GOOD | {"chain": {}}, "it.chain is {}; expected a list"),
        (GOOD | {"chain": None}, "it.chain is null"),
        (GOOD | {"chain": ["2026-01-03"]}, "it.chain[0]"),
        (GOOD | {"chain": [LINK, LINK]}, "expected different names"),
        (GOOD | {"chain": [LINK | {"name": 3}]}, "it.chain[0].name is 3; expected text"),
        (GOOD | {"chain": [LINK | {"checksum": None}]}, "it.chain[0].checksum is null; expected text"),
        (GOOD | {"partition": 3}, "it.partition is 3; expected text"),
        (GOOD | {"partition": "2026-01-02"}, "up to 2026-01-02"),
        (GOOD | {"step": -1}, "it.step is -1"),
        (GOOD | {"step": True}, "it.step is true"),
        (GOOD | {"checksum": "00000000"}, "its checksum does not match"),
        *(
            (GOOD | {"partition": name, "chain": [LINK | {"name": name}]}, "expected a folder beside it")
            for name in ("..", ".", "", "../x", "/etc", "a/b", "a\0b", "..\\x", "C:x")
        ),
    ],
)
def test_latest_that_is_whole_and_says_nonsense_is_one_line(days, tmp_path, said, problem):
    """As a crafted one would: with the right checksum."""
    if isinstance(said, dict) and "chain" in said:
        said = {"checksum": checksum(said), **said}
    latest = tmp_path / "run" / "published" / "latest"
    latest.write_text(json.dumps(said))
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        serve(days, tmp_path / "served")
    assert problem in str(raised.value) and "\n" not in str(raised.value) and "damaged" in str(raised.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 50_000, "", "NaN", "{" * 3])
def test_latest_that_is_no_json_is_one_line(days, tmp_path, content):
    (tmp_path / "run" / "published" / "latest").write_text(content)
    with pytest.raises(CheckpointError, match="latest is damaged: "):
        serve(days, tmp_path / "served")
    (tmp_path / "run" / "published" / "latest").unlink()
    with pytest.raises(CheckpointError, match="holds no latest: nothing is published there"):
        serve(days, tmp_path / "served")
    assert not (tmp_path / "served").exists()


def damage(folder: Path, path: str, how: str) -> None:
    file = folder / path
    if how == "missing":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 3)
    else:
        flip(file, file.stat().st_size // 3)


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("newer", [False, True])
def test_a_damaged_copy_is_rebuilt_and_the_line_says_so(days, tmp_path, how, newer):
    """Each of its files, where it is up to date already and where changes would go on top."""
    served = tmp_path / "served"
    serve(days, served)
    if newer:
        days.publish("delta")
        shutil.copytree(served, tmp_path / "older")
    for path in [path for path in tree(served) if (served / path).is_file()]:
        if newer:
            shutil.rmtree(served)
            shutil.copytree(tmp_path / "older", served)
        damage(served, path, how)
        said = serve(days, served)
        assert f"is 2026-01-0{3 + newer} now: the whole model and {2 + newer} publication(s) of changes" in said
        assert "what was there was damaged and is rebuilt: " in said
        assert days.is_served(served)
        assert serve(days, served) == f"{served} is 2026-01-0{3 + newer} already"


@pytest.mark.parametrize("name", ["manifest.json", "training.json"])
def test_a_copy_is_known_again_with_any_bit_flipped(days, tmp_path, name):
    served = tmp_path / "served"
    serve(days, served)
    whole = (served / name).read_bytes()
    for place in range(len(whole)):
        (served / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert is_served(served) is None
    (served / name).write_bytes(whole)
    (served / "rows" / "notes").write_text("mine")
    assert is_served(served) == "it holds rows/notes, which apply_delta.py did not write"


def test_what_is_published_and_damaged_leaves_the_copy_as_it_was(days, tmp_path):
    served = tmp_path / "served"
    serve(days, served)
    days.publish("delta")
    before = tree(served)
    for name in ("2026-01-01", "2026-01-03", "2026-01-04"):
        rows = tmp_path / "run" / "published" / name / "rows" / "a" / "00000-of-00001.parquet"
        flip(rows, 100)
        with pytest.raises(CheckpointError, match="checksum .*; remove it and start the run's `tessera daily` again"):
            serve(days, served)
        flip(rows, 100)
    aside = tmp_path / "run" / "published" / "2026-01-02"
    aside.rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match="2026-01-02, which it builds on: it has no manifest"):
        serve(days, served)
    assert tree(served) == before
    (tmp_path / "aside").rename(aside)
    serve(days, served)
    assert days.is_served(served)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("mine", "it holds thesis and is no model that apply_delta.py wrote"),
        ("run", "contains"),
        ("run/published", "is"),
        ("run/published/2026-01-01", "lies inside"),
        ("run/published/new", "lies inside"),
        (".", "contains"),
        ("best", "is no model that apply_delta.py wrote"),
        ("link", "is"),
        ("file", "it is not a folder"),
        ("served-with-notes", "it holds notes.md, which apply_delta.py did not write"),
        ("served-with-notes-and-damage", "it holds notes.md, which apply_delta.py did not write"),
    ],
)
def test_a_target_that_is_not_a_copy_of_ours_is_refused(days, tmp_path, target, problem):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    shutil.copytree(tmp_path / "run" / "published" / "2026-01-01", tmp_path / "best")  # a model, not one of a copy
    (tmp_path / "link").symlink_to("run/published")
    (tmp_path / "file").write_text("mine")
    for name in ("served-with-notes", "served-with-notes-and-damage"):
        serve(days, tmp_path / name)
        (tmp_path / name / "notes.md").write_text("mine")
    flip(tmp_path / "served-with-notes-and-damage" / "manifest.json", 30)
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as raised:
        serve(days, tmp_path / target)
    assert str(raised.value).startswith("OUTPUT ") and problem in str(raised.value) and "\n" not in str(raised.value)
    assert tree(tmp_path) == before


def test_calls_at_once_wait_for_each_other(days, tmp_path):
    said: list[str] = []

    def call() -> None:
        said.append(apply(days.root.name, tmp_path / "served", alone(), wait_seconds=60))

    for expected in ("the whole model and 2", "2026-01-03 and 1"):
        said.clear()
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(expected in line for line in said) == 1 and sum("already" in line for line in said) == 2
        assert days.is_served(tmp_path / "served")
        days.publish("delta")


def test_a_call_that_waited_long_enough_names_the_holder(days, tmp_path):
    serve(days, tmp_path / "served")
    before = tree(tmp_path / "served")
    lock = FolderLock(tmp_path / "served", path=tmp_path / ".served.lock")
    days.publish("delta")
    with pytest.raises(FolderInUse, match=f"{tmp_path}/served is in use by process {os.getpid()} on "):
        serve(days, tmp_path / "served", wait_seconds=0.3)
    assert tree(tmp_path / "served") == before
    lock.release()
    serve(days, tmp_path / "served")


def kill_everywhere(published: str, older: Path, newer: Path, served: Path, exchanges: bool, each: int) -> None:
    """Bring copies of `older` up to date by processes of which each is killed at another operation on the disk."""
    wanted = {name: (rows_of_state(folder), tensors_of_state(folder)) for name, folder in (("o", older), ("n", newer))}
    status, operation, seen = 9, random.randrange(each), Counter()
    while status == 9:
        shutil.rmtree(served.parent, ignore_errors=True)
        shutil.copytree(older, served)
        if not (child := os.fork()):
            killed_at(operation, published, served, exchanges)
        status, operation = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), operation + each
        if served.exists():
            open_saved(Storage(served), alone())
            found = rows_of_state(served), tensors_of_state(served)
            seen[next(name for name in wanted if wanted[name] == found)] += 1
        else:
            seen["neither"] += 1
        apply(published, served, alone())
        assert (rows_of_state(served), tensors_of_state(served)) == wanted["n"]
        assert {path.name for path in served.parent.iterdir()} == {"served", ".served.lock"}
    assert status == 0 and seen["o"] > 10 // each and seen["n"] > 2 // each, seen
    assert seen["neither"] == (not exchanges) or each > 1 and seen["neither"] <= 1, seen


def killed_at(operation: int, published: str, output: Path, exchanges: bool) -> None:
    """Bring a copy up to date; leave with 9 before an operation on the disk, with 0 when there are fewer."""
    left = operation

    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return function(*arguments, **options)

        return call

    if not exchanges:
        states.exchange = lambda *_: False
    for owner, names in ((os, ("rename", "replace", "remove", "unlink", "rmdir", "fsync")), (states, ["exchange"])):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    apply(published, output, alone())
    os._exit(0)


@pytest.mark.parametrize(
    ("exchanges", "each"),
    [pytest.param(True, 1, marks=pytest.mark.slow), pytest.param(False, 1, marks=pytest.mark.slow), (False, 3)],
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_model(days, tmp_path, exchanges, each):
    """Where the system cannot exchange names one moment shows neither, and the next call puts the old one back.

    each: of how many operations on the disk one is tried, from a first one that is drawn.
    """
    older, newer = tmp_path / "older", tmp_path / "newer"
    serve(days, older)
    days.publish("delta")
    serve(days, newer)
    assert days.is_served(newer)
    arguments = (days.root.name, older, newer, tmp_path / "place" / "served", exchanges, each)
    child = _context().Process(target=kill_everywhere, args=arguments)
    child.start()
    child.join(100)
    assert child.exitcode == 0


def test_random_damage_of_both_sides_never_serves_a_wrong_model(days, tmp_path):
    """Files of publications, `latest` and the copy are flipped, cut and removed at random. Each call either serves the
    right model or ends with one line; undone, it serves the right one."""
    draw, served, refused = random.Random(5), tmp_path / "served", 0
    for _ in range(40):
        if draw.random() < 0.7:
            days.publish(draw.choice(["delta", "full"]))
        roots = [served, tmp_path / "run" / "published"]
        files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
        victim = draw.choice(files)
        content, how = victim.read_bytes(), draw.choice(["flip", "cut", "remove"])
        if how == "flip":
            flip(victim, draw.randrange(len(content)), draw.randrange(8))
        elif how == "cut":
            victim.write_bytes(content[: draw.randrange(len(content))])
        else:
            victim.unlink()
        try:
            serve(days, served)
            assert days.is_served(served)
        except TesseraError as error:
            assert "\n" not in str(error)
            refused += 1
        if served not in victim.parents:
            victim.write_bytes(content)
        serve(days, served)
        assert days.is_served(served)
    assert refused > 5


def test_publications_behind_a_uri_are_served(tmp_path, store):
    """Published straight into an object store and read from there."""
    days = published(store.uri("run/published"), "full", "delta")
    assert "the whole model and 1" in serve(days, tmp_path / "served")
    assert days.is_served(tmp_path / "served")
    days.publish("delta")
    assert "2026-01-02 and 1 publication(s)" in serve(days, tmp_path / "served")
    assert days.is_served(tmp_path / "served")
    rows = "run/published/2026-01-03/rows/a/00000-of-00001.parquet"
    content = store.get(rows)
    store.put(rows, content[:100] + bytes([content[100] ^ 1]) + content[101:])
    days.publish("delta")
    with pytest.raises(CheckpointError, match="rows/a/00000-of-00001.parquet has the checksum"):
        serve(days, tmp_path / "served")
    store.put(rows, content)
    serve(days, tmp_path / "served")
    assert days.is_served(tmp_path / "served")
    assert Storage(days.root.name).names() == ["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04", "latest"]
