"""A result takes the place of an earlier one as one thing, wherever a kill comes in between."""

from __future__ import annotations

import os
import shutil

import pytest

from tessera.ctr.report.result import PIECES, PREDICTIONS, begin_result, commit_result, settle_result


class Killed(BaseException):
    pass


def write_result(folder, name, pieces=PIECES):
    for piece in pieces:
        if piece == PREDICTIONS:
            (folder / piece).mkdir()
            for rank in range(3 if name == "old" else 1):
                (folder / piece / f"test-{rank:05d}.parquet").write_text(name)
        else:
            (folder / piece).write_text(name)


def seen(folder):
    """Which results the pieces in their places are of, and how many pieces there are."""
    found = {}
    for piece in PIECES:
        path = folder / piece
        if path.is_dir():
            found |= {f"{piece}/{one.name}": one.read_text() for one in path.iterdir()}
        elif path.exists():
            found[piece] = path.read_text()
    return found


def whole(name, pieces=PIECES):
    files = {"old": 3, "new": 1}[name]
    found = dict.fromkeys((piece for piece in pieces if piece != PREDICTIONS), name)
    if PREDICTIONS in pieces:
        found |= {f"{PREDICTIONS}/test-{rank:05d}.parquet": name for rank in range(files)}
    return found


def killed_at(monkeypatch, number):
    """From the `number`-th change of a name on, nothing is done any more."""
    calls = []
    for module, function in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
        original = getattr(module, function)

        def counted(*arguments, original=original, **options):
            calls.append(1)
            if len(calls) > number:
                raise Killed
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, counted)


@pytest.mark.parametrize("pieces", [PIECES, PIECES[1:]], ids=["scored", "nothing scored"])
@pytest.mark.parametrize("number", range(14))
def test_a_kill_leaves_the_old_or_the_new_result_and_never_a_mix(tmp_path, monkeypatch, number, pieces):
    write_result(tmp_path, "old")
    (tmp_path / "best").mkdir()
    with monkeypatch.context() as patched:
        killed_at(patched, number)
        try:
            write_result(begin_result(tmp_path), "new", pieces)
            commit_result(tmp_path)
        except Killed:
            pass
    assert len(set(seen(tmp_path).values())) <= 1  # as it lies there
    settle_result(tmp_path)  # as whoever opens the run sees it
    assert seen(tmp_path) in (whole("old"), whole("new", pieces))
    # The next end of the run is not kept from its place.
    write_result(begin_result(tmp_path), "new", pieces)
    commit_result(tmp_path)
    assert seen(tmp_path) == whole("new", pieces)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["best", *pieces])


def test_the_first_result_of_a_run_and_a_killed_settling_of_it(tmp_path, monkeypatch):
    write_result(begin_result(tmp_path), "new")
    with monkeypatch.context() as patched:
        killed_at(patched, 2)
        with pytest.raises(Killed):
            commit_result(tmp_path)
    for _ in range(2):
        settle_result(tmp_path)
        assert seen(tmp_path) == whole("new")
