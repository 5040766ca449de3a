"""A disk that does not answer while a state is written: the job ends within the limit and says who was waited for."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tessera.distributed.saved.states import folder_name
from tessera.distributed.saved.watch import ELSEWHERE, WAITING, describe
from tests.ctr.train.states import arguments, write_data

LIMIT = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", 1500)


def job(data: Path, tmp_path: Path, *, overlap: bool) -> list[str]:
    states = f"trainer.checkpoint.folder={tmp_path}/states"
    more = ["trainer.epochs=20", "trainer.checkpoint.every=5", f"trainer.timeout_seconds={LIMIT}"]
    more += ["trainer.batch_size=100", "trainer.eval_every=1000", f"trainer.checkpoint.overlap={overlap}"]
    return arguments(data, tmp_path / "run", states, *more)


@pytest.mark.parametrize(
    ("rank", "file", "overlap"),
    [
        (1, "rows/row/00001-of-00002.parquet", True),
        pytest.param(1, "dense/00001-of-00002-000.safetensors", False, marks=pytest.mark.slow),
        pytest.param(0, "manifest.json", True, marks=pytest.mark.slow),
    ],
)
def test_a_write_that_hangs_is_named_within_the_limit(ranks, data, tmp_path, rank, file, overlap):
    where = tmp_path / "states" / f".partial-{folder_name(10)}" / file
    ranks.start(2, job(data, tmp_path, overlap=overlap), tmp_path / "output", hang=str(where))
    assert ranks.wait(60 + 4 * LIMIT) == [1, 1]
    said = [line for line in (tmp_path / "output").read_text().splitlines() if line.startswith("error: ")]
    assert said == [f"error: {folder_name(10)} cannot be saved: for {LIMIT} s rank {rank} has been writing {file}"]
    assert (tmp_path / "states" / folder_name(5) / "manifest.json").exists()


@pytest.mark.slow
def test_a_rank_that_stands_still_while_others_save_is_named(ranks, data, tmp_path):
    pids = ranks.start(2, job(data, tmp_path, overlap=True), tmp_path / "output")
    end = time.monotonic() + 60
    while not any((tmp_path / "states").glob(".partial-*")) and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(pids[1], signal.SIGSTOP)
    try:
        end = time.monotonic() + 60
        while ranks.wait(0)[0] is None and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):  # rank 0 ends it too
            os.kill(pids[1], signal.SIGKILL)
    assert ranks.wait()[0] == 1
    said = [line for line in (tmp_path / "output").read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "rank 1 " in said[0] and "rank 0 " not in said[0].split("(rank 0 saw")[0], said


def test_who_is_to_blame():
    assert describe([[WAITING, 3], ["writing a", 2]]) == "rank 1 has been writing a"
    assert describe([[WAITING, 3], [ELSEWHERE, 2]]) == f"rank 1 has been {ELSEWHERE}"
    assert describe([["behind a", 3], ["writing b", 2], ["writing c", 1]]) == (
        "rank 1 has been writing b, rank 2 has been writing c"
    )
    assert describe([[WAITING, 3]] * 2).count(WAITING) == 2
