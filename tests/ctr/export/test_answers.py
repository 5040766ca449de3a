"""What waits for labels outlives the server: a restart, a failure at any write, kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tessera.ctr.serving import ExportError
from tessera.ctr.serving.answers import NAMES
from tessera.ctr.serving.error_memory import FILE, ErrorMemory, MemorySettings
from tessera.ctr.serving.feedback import Feedback, Waiting
from tests.ranks import PYTHONPATH

WIDTH = 3


def opened(folder: Path, waiting: Waiting | None = None) -> Feedback:
    return Feedback.open(folder, ErrorMemory(WIDTH, MemorySettings(arrays=1, bits=1), "m"), waiting)


def ask(feedback: Feedback, rows: int, base: str = "m") -> list[str]:
    hidden = np.random.default_rng(rows).normal(size=(rows, WIDTH)).astype(np.float32)
    return feedback.answer(base, np.full(rows, 0.25, np.float32), hidden)[1]


def tell(feedback: Feedback, keys: list[str]) -> dict[str, int]:
    return {name: number for name, number in feedback.take([(key, 1) for key in keys]).items() if number}


def test_keys_are_known_after_a_restart_and_count_once(tmp_path):
    folder = tmp_path / "memory"
    first = opened(folder)
    with pytest.raises(ExportError, match="is in use by another server; .*--memory"):
        opened(folder)
    keys = ask(first, 4) + ask(first, 2) + ask(first, 3, "another")
    assert tell(first, keys[:3]) == {"taken": 3}
    first.save()
    assert tell(first, keys[3:5]) == {"taken": 2}
    late = ask(first, 2)
    first.save()
    first.save()
    first.close()
    second = opened(folder)
    assert second.memory.rows == 5 and len(list(folder.glob(NAMES))) == 2
    assert tell(second, [*keys, *late]) == {"taken": 3, "repeated": 5, "stale": 3}
    more = ask(second, 2)
    assert not set(more) & {*keys, *late}
    second.save()
    second.close()
    assert tell(opened(folder), [*keys[:6], *late, *more]) == {"taken": 2, "repeated": 8}


def test_what_was_answered_before_is_written_as_the_model_said_it(tmp_path):
    kept, lost = opened(tmp_path / "kept"), opened(tmp_path / "lost")
    keys = [ask(kept, 40), ask(lost, 40)]
    lost.save()
    lost.close()
    lost = opened(tmp_path / "lost")
    for feedback, own in zip((kept, lost), keys, strict=True):
        assert tell(feedback, own[::2]) == {"taken": 20}
    assert kept.memory.checksum() == lost.memory.checksum()


def test_files_are_no_more_than_is_waited_for(tmp_path):
    now = [1000.0]
    feedback = Feedback(ErrorMemory(WIDTH, MemorySettings(bits=0), "m"), tmp_path, Waiting(5, 60), lambda: now[0])
    keys = []
    for _ in range(6):
        keys.append(ask(feedback, 2))
        feedback.save()
    assert len(list(tmp_path.glob(NAMES))) == 2, "of five rows those of two requests"
    assert tell(feedback, [key for some in keys for key in some]) == {"taken": 4, "unknown": 8}
    now[0] += 61
    feedback.save()
    assert not list(tmp_path.glob(NAMES)) and ErrorMemory.load(tmp_path).rows == 4
    ask(feedback, 5)
    feedback.save()
    now[0] += 61
    memory = ErrorMemory.load(tmp_path)
    assert tell(Feedback(memory, tmp_path, Waiting(5, 60), lambda: now[0]), keys[-1]) == {"unknown": 2}
    assert len(ask(feedback, 100_000)) == 100_000 and not feedback._answered, "more than are waited for at all"


@pytest.mark.parametrize("damage", ["short", "changed", "other", "renamed", "marks"])
def test_a_damaged_file_is_refused_in_a_line(tmp_path, damage):
    first = opened(tmp_path)
    tell(first, ask(first, 4)[:2])
    first.save()
    first.close()
    path = next(tmp_path.glob(NAMES))
    content = bytearray(path.read_bytes())
    if damage == "short":
        del content[-3:]
    if damage == "changed":
        content[-1] ^= 1
    if damage == "other":
        content[:] = b"\0" * 20
    path.write_bytes(content)
    if damage == "renamed":
        path.rename(path.with_name("answers-00000000-000000.safetensors"))
    if damage == "marks":
        memory = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(memory.replace(b"written_rows", b"written_xxxx"))
    with pytest.raises(ExportError) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_write_that_fails_or_ends_the_server_loses_no_label_and_counts_none_twice(tmp_path, monkeypatch):
    replace, unlink, left = os.replace, Path.unlink, [0]

    def until_the_end(call):
        def called(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise OSError("no space")
            return call(*arguments, **options)

        return called

    monkeypatch.setattr(os, "replace", until_the_end(replace))
    monkeypatch.setattr(Path, "unlink", until_the_end(unlink))
    for moment in range(9):
        folder = tmp_path / str(moment)
        left[0] = 1000
        feedback, keys = opened(folder, Waiting(rows=7)), []
        left[0], failed = moment, False
        for _ in range(3):
            keys += ask(feedback, 3)
            assert tell(feedback, keys[-2:-1]) == {"taken": 1}
            try:
                feedback.save()
            except OSError:
                failed = True
                break
        left[0] = 1000
        feedback.close()
        again = opened(folder)
        rows, told = again.memory.rows, again.take([(key, 1) for key in keys])
        assert failed == (moment < 7) and not told["stale"]
        assert told["repeated"] == rows - (not failed), "three requests of three rows are more than seven"
        assert told["unknown"] == (3 * (len(keys) // 3 - moment // 2 - moment % 2) if failed else 3)
        assert not list(folder.glob(".answers*")), "nothing is left half written"


WORK = """
import sys
from pathlib import Path
from tests.ctr.export.test_answers import ask, opened, tell
feedback, keys = opened(Path(sys.argv[1])), []
while True:
    keys += ask(feedback, 5)
    print(*keys[-5:], flush=True)
    tell(feedback, keys[-9:-6])
    if len(keys) % 3 == 0:
        feedback.save()
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_what_was_not_saved_alone(tmp_path):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    known, keys = 0, []
    for attempt in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            keys += child.stdout.readline().split()
            time.sleep(0.05 + 0.15 * attempt)
            child.send_signal(signal.SIGKILL)
            said = child.stdout.read().splitlines()
            keys += [key for line in said for key in line.split() if key.count("-") == 2]
        feedback = opened(tmp_path)
        rows = feedback.memory.rows
        told = feedback.take([(key, 1) for key in keys])
        feedback.close()  # without saving: the next one finds what the killed server left
        assert told["repeated"] == rows and not told["stale"], (told, rows)
        assert told["unknown"] <= len(keys) - known
        known = told["repeated"] + told["taken"]
    assert known > 50
