"""What a machine runs out of, and what a disk refuses outside of a save: one line, whichever rank it meets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ctr.train.states import arguments, write_data
from tests.drill.damage import SmallDisk

SOON = {"STALE_SECONDS": 2.0, "HEARTBEAT_SECONDS": 0.1}
STEP, REPORT = "step 4: forward", "writing the report"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", 1500, valid=400)


@pytest.fixture
def disk(tmp_path):
    if not SmallDisk.possible(tmp_path):
        pytest.skip("no file system can be mounted here")
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


def error(ranks, data: Path, run_dir: Path, output: Path, world: int, at: tuple | None, *more: str) -> str:
    """The one error that a job says to which something happens; all its ranks end."""
    loop = ["trainer.epochs=1", "trainer.timeout_seconds=30", "trainer.batch_size=100", *more]
    ranks.start(world, arguments(data, run_dir, *loop), output, at=at, **SOON)
    statuses = ranks.wait(60)
    text = output.read_text()
    assert set(statuses) <= {1, 2}, (statuses, text)
    assert "Traceback" not in text and "Logging error" not in text and "Exception" not in text.split("error: ")[0], text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize(
    ("what", "stage", "words", "remedy"),
    [
        ("no memory", STEP, "out of memory", "give the job more memory (ulimit -v"),
        ("no files", STEP, "out of open files", "raise the limit of open files (ulimit -n)"),
        ("no threads", STEP, "out of threads", "raise the limit of processes and threads (ulimit -u"),
    ],
)
def test_what_runs_out_is_named_with_rank_stage_and_remedy(ranks, data, tmp_path, what, stage, words, remedy):
    line = error(
        ranks, data, tmp_path / "run", tmp_path / "output", 2, (stage, what, [1]), "trainer.checkpoint.every=6"
    )
    assert words in line and remedy in line and "rank 1" in line


@pytest.mark.parametrize(
    ("stage", "world"), [(STEP, 1), (REPORT, 1), pytest.param(STEP, 2, marks=SLOW), pytest.param(REPORT, 2, marks=SLOW)]
)
def test_a_full_disk_is_one_line_outside_of_saves(ranks, data, tmp_path, disk, stage, world):
    disk.leave_free(6 << 20)
    run_dir = tmp_path / "disk" / "run"
    states = f"trainer.checkpoint.folder={tmp_path}/states"
    line = error(ranks, data, run_dir, tmp_path / "output", world, (stage, "disk full", [0]), states)
    assert f"{run_dir}" in line and "No space left on device; free some space" in line and "rank 0" in line


def test_a_disk_that_is_full_at_the_start_is_one_line(ranks, data, tmp_path, disk):
    disk.leave_free(8192)
    (tmp_path / "disk" / "filler").write_bytes(bytes(4096))
    line = error(ranks, data, tmp_path / "disk" / "run", tmp_path / "output", 1, None)
    assert f"{tmp_path}/disk/run" in line and "No space left on device" in line


@pytest.mark.parametrize("stage", [STEP, pytest.param(REPORT, marks=SLOW)])
def test_a_folder_that_vanishes_is_named(ranks, data, tmp_path, stage):
    at = (stage, "folder vanishes", [0])
    states = f"trainer.checkpoint.folder={tmp_path}/states"
    line = error(ranks, data, tmp_path / "run", tmp_path / "output", 1, at, states)
    assert f"{tmp_path}/run" in line and "is not there any more" in line


@pytest.mark.parametrize(
    ("key", "location", "words"),
    [
        ("trainer.checkpoint.folder", "nope://bucket/states", "nope"),
        ("data.path", "nope://bucket/data", "nope"),
        pytest.param("trainer.checkpoint.folder", "gdrive://bucket/states", "gdrive", marks=SLOW),
        pytest.param("data.path", "oss://bucket/data", "oss", marks=SLOW),
    ],
)
def test_a_file_system_that_nothing_here_opens_is_one_line(ranks, data, tmp_path, key, location, words):
    line = error(ranks, data, tmp_path / "run", tmp_path / "output", 1, None, f"{key}={location}")
    assert location in line and words in line
