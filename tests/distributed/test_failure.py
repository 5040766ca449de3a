"""What runs out and what a disk refuses come up as errors of many types; each is one line that names it."""

from __future__ import annotations

import errno
import os

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from tessera.ctr.data.errors import DataError
from tessera.distributed.failure import explain, is_broken_collective, of_start
from tessera.distributed.process import run_alone
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError


@pytest.fixture
def process():
    return Process(2, 0, 1, torch.device("cpu"), dist.HashStore(), stage="step 7: forward", folder="runs/mine")


def os_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (MemoryError(), "out of memory", "ulimit -v"),
        (RuntimeError("std::bad_alloc"), "out of memory", "ulimit -v"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 40 bytes"), "out of memory", "trainer.batch_size"),
        (pa.ArrowMemoryError("malloc of size 64 failed"), "out of memory", "ulimit -v"),
        (os_error(errno.ENOMEM), "out of memory", "ulimit -v"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of GPU memory", "cache_rows"),
        (RuntimeError("can't start new thread"), "out of threads", "ulimit -u"),
        (os_error(errno.EAGAIN), "out of threads", "ulimit -u"),
        (RuntimeError("Resource temporarily unavailable"), "out of threads", "trainer.threads"),
        (os_error(errno.EMFILE, "data/part.parquet"), "out of open files", "ulimit -n"),
        (RuntimeError("[../gloo/transport/tcp/device.cc:84] socket: Too many open files"), "out of open", "ulimit -n"),
    ],
)  # fmt: skip
def test_what_ran_out_is_named_with_rank_stage_and_remedy(process, error, what, remedy):
    status, line = explain(error, process)
    assert status == 1 and "\n" not in line
    assert line.startswith("error: rank 2, step 7: forward: ") and what in line and remedy in line


def test_what_ran_out_is_named_where_another_error_was_made_of_it(process):
    """The reader blames the file that it could not open."""
    with pytest.raises(DataError) as raised:
        try:
            raise os_error(errno.EMFILE, "part.parquet")
        except OSError:
            raise DataError("part.parquet: cannot be opened") from None
    status, line = explain(raised.value, process)
    assert status == 2
    assert line.startswith("error: part.parquet: cannot be opened; out of open files: raise the limit")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (os_error(errno.ENOSPC), "runs/mine: No space left on device; free some space, or choose"),
        (os_error(errno.EDQUOT, "x/report.json"), "x/report.json: Disk quota exceeded; free some space"),
        (os_error(errno.EROFS, "x/metrics.jsonl"), "x/metrics.jsonl: Read-only file system; choose a folder that can"),
        (os_error(errno.EACCES, "x"), "x: Permission denied; choose a folder that this user can read and write"),
        (os_error(errno.ENOENT, "x/train.log"), "x/train.log: No such file or directory; it, or the folder"),
        (os_error(errno.EIO), "runs/mine: Input/output error; look at the disk or at its mount"),
        (os_error(errno.ESTALE, b"x"), "x: Stale file handle; look at the disk or at its mount"),
        (OSError("When uploading part: 503"), "runs/mine: When uploading part: 503"),
    ],
)  # fmt: skip
def test_what_a_disk_refuses_is_one_line_with_path_and_stage(process, error, line):
    status, said = explain(error, process)
    assert status == 1 and said.startswith(f"error: rank 2, step 7: forward: {line}")
    assert "\n" not in said


def test_a_bug_keeps_its_trace(process):
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        _, line = explain(error, process)
    assert line.startswith("Traceback") and line.endswith("error: rank 2, step 7: forward: ZeroDivisionError: a bug")


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40001",
        "Application timeout caused pair closure",
        "[c10d] recvValue failed on SocketImpl: Broken pipe",
        "Timed out waiting 5000ms for recv operation to complete",
    ],
)
def test_a_rank_that_waited_in_vain_is_no_culprit(text):
    assert is_broken_collective(RuntimeError(text))
    assert not is_broken_collective(ValueError(text)) and not is_broken_collective(RuntimeError("shape mismatch"))


def test_a_port_in_use_is_one_line_that_says_which(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    taken = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(taken.port))
    with pytest.raises(RuntimeError) as error:
        dist.TCPStore("127.0.0.1", taken.port, is_master=True, wait_for_workers=False)
    line = of_start(error.value, 0)
    assert line.startswith(f"rank 0 cannot open the job's store at 127.0.0.1:{taken.port}: the port is in use")
    assert "--master-port" in line


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("key x"), 2, "error: key x"),
        (os_error(errno.ENOSPC, "out/page.html"), 1, "error: out/page.html: No space left on device; free some space"),
        (MemoryError(), 1, "error: out of memory (MemoryError: ); give the job more memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_commands_without_ranks_say_the_same(capsys, error, status, line):
    def fail() -> None:
        raise error

    assert run_alone(fail) == status
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1
