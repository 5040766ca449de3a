"""Start, agreement on failure, and clean end of the ranks of one job.

Ranks run under `torchrun`, or alone without it. Each publishes signs of life and the stage it is in to the job's
store, so that whoever survives a failure can say which rank stopped and where.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tessera.distributed.collectives import gather_objects
from tessera.distributed.failure import explain, of_start
from tessera.distributed.heartbeat import (
    STALE_SECONDS,
    ask,
    beat,
    end_neighbours,
    keep_beating,
    let_other_ranks_leave,
    speaks_for_host,
)
from tessera.distributed.last_word import say
from tessera.distributed.meeting import RankFailure, meet
from tessera.distributed.rank import AGAIN_SECONDS, Process, Terminated
from tessera.embedding.errors import ConfigError, TesseraError

T = TypeVar("T")

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
PR_SET_PDEATHSIG = 1  # of sys/prctl.h
STOPPED = 75  # exit status of a rank that was asked to stop, saved its state and can go on later (EX_TEMPFAIL)
INTERRUPTED = 130  # exit status behind Ctrl-C where nothing was saved


class Stopped(BaseException):
    """All ranks leave in agreement and nothing is unsaved; `run` returns the status, 75 if they were asked to stop,
    and says the line."""

    def __init__(self, status: int = STOPPED, line: str | None = None) -> None:
        super().__init__(status)
        self.status, self.line = status, line


def start(device: str = "auto", timeout_seconds: float = 300.0) -> Process:
    """Join the job's process group (gloo on the CPU, nccl beside it on GPUs) and begin to publish signs of life.

    Raises:
        ConfigError: the device is not there.
        RankFailure: not all ranks have come within the time, or the port of their store is in use.
    """
    keep_freed_memory()
    silence_torchrec()
    end_with_launcher()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _choose_device(device, local_rank)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store: dist.Store = dist.HashStore()
    try:
        if "MASTER_ADDR" in os.environ:
            store, rank, world = next(rendezvous("env://", timeout=timeout))
        store = meet(store, rank, world, timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except Exception as error:
        line = None if isinstance(error, TesseraError) else of_start(error, rank)
        if line is None:
            raise
        raise RankFailure(line) from error
    store = dist.PrefixStore("tessera", dist.distributed_c10d._get_default_store())
    process = Process(rank, local_rank, world, chosen, store)
    if world > 1:
        mine = beat(process)
        threading.Thread(target=keep_beating, args=(process,), daemon=True, name="heartbeat").start()
        everyone = gather_objects(mine)  # not from the store, which would be asked as often as there are pairs of ranks
        process.beats = {rank: one for rank, one in enumerate(everyone) if rank != process.rank}
    return process


def end_with_launcher() -> None:
    """Have the kernel kill this rank when torchrun, which started it, is gone: nobody would end it, and the ranks that
    a new launcher starts would find its folder in use. Elsewhere than on Linux nothing is done."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher or launcher == 1:  # it was gone before that
        os._exit(1)


def silence_torchrec() -> None:
    """Drop what torch and torchrec say of each other and of torchrec's planner: users can do nothing about it."""
    # torchrec 1.8 calls by names that torch 2.13 will rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*|torchrec\..*")
    for noisy in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed, as a step needs the same memory as the one before.

    By default it hands large blocks back to the system and gets them anew: thousands of page faults in a step of
    DeepFM. Elsewhere than on glibc nothing is done.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most it takes
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    libc.mallopt(M_TOP_PAD, 64 << 20)


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"trainer.device is {device!r}; expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device is cuda but torch finds no GPU here; run `tessera doctor`")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, found = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if ranks > found:  # all ranks of the host say so, of which one is heard
        raise ConfigError(
            f"{ranks} ranks on this host, and torch finds {found} GPU(s), expected one for each rank; "
            "start fewer ranks or set trainer.device=cpu"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def stop(process: Process) -> None:
    """Leave the process group. The caller has dropped its model: live references make gloo ranks abort at exit."""
    process._ended.set()
    gc.collect()
    dist.destroy_process_group()


def run(load: Callable[[], tuple[T, str, float]], main: Callable[[T, Process], None]) -> int:
    """Run `main` on this rank and return the exit status: 0, 2 for a user's mistake, 75 if it was asked to stop and
    has saved its state (or what `Stopped` says), 130 behind Ctrl-C where nothing was saved, 1 for anything else.

    A failure is said once for the whole job, by the first rank that reports it.

    Args:
        load: gives the configuration, the device ("auto", "cpu", "cuda") and the longest wait for another rank in
            seconds. It runs before the ranks meet, so it must fail on all of them or on none.
    """
    process = None
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        config, device, timeout_seconds = load()
        process = start(device, timeout_seconds)
        _watch_signals(process)
        threading.excepthook = lambda failed: _leave_because(
            failed.exc_value or RuntimeError("a thread failed"), process
        )
        status, line = 0, None
        try:
            main(config, process)
        except Stopped as stopped:
            status, line = stopped.status, stopped.line
        stop(process)  # here, where no exception's frames hold on to the model any more
        if line is not None and process.is_main:
            say(line)
        return status
    except (Exception, Terminated, KeyboardInterrupt) as error:
        _leave_because(error, process)


def run_alone(main: Callable[[], int | None]) -> int:
    """Run a command that has no ranks and return its exit status: what it returns, 2 for a user's mistake, 130 behind
    Ctrl-C, 1 for anything else, with one line that says what happened."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        status, line = explain(error, None)
        print(line, file=sys.stderr)
        return status


def _leave_because(error: BaseException, process: Process | None) -> NoReturn:
    """End this rank with what is to be said of an error, from whatever thread."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the launcher ends survivors while they find out why
    if isinstance(error, KeyboardInterrupt):
        where = f" during {process.stage}" if process else ""
        leave(process, f"interrupted by Ctrl-C{where}; what was saved before is as it was", INTERRUPTED)
    status, line = explain(error, process)
    leave(process, line, status)


def leave(process: Process | None, line: str, status: int = 1) -> NoReturn:
    """End this rank from whatever thread. The line is said once for the whole job."""
    if _first_to_report(process, line):
        say(line)
    if process is not None:
        process._ended.set()
        end_neighbours(process)
        let_other_ranks_leave(process)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    # A failed rank's process group cannot be closed in agreement with the others; leave at once so that
    # their collectives fail at once, instead of in destructors that may wait.
    os._exit(status)


def job_store() -> dist.Store:
    """Return a store that outlives restarts of the ranks by torchrun (`Process.store` is new after each)."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.PrefixStore("tessera", store)


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise Terminated


def _watch_signals(process: Process) -> None:
    """Let `process` take SIGTERM and Ctrl-C. Python calls handlers between two of its own steps only, so a thread sees
    to it that a second Ctrl-C ends a rank whose main thread waits in a collective or for a disk."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, process.on_signal)
    seen, sent = os.pipe()
    os.set_blocking(sent, False)
    signal.set_wakeup_fd(sent, warn_on_full_buffer=False)

    def watch() -> None:
        first = None
        while number := os.read(seen, 1):
            if number[0] != signal.SIGINT:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first >= AGAIN_SECONDS:
                time.sleep(1.0)  # the main thread leaves by itself if it can
                _leave_because(KeyboardInterrupt(), process)

    threading.Thread(target=watch, daemon=True, name="signals").start()


def _first_to_report(process: Process | None, line: str) -> bool:
    """Return True for the one rank of the job that shall print. Without a store (start failed), that is rank 0."""
    if process is None:
        return int(os.environ.get("RANK", 0)) == 0
    if process.world_size == 1:
        return True
    text = line.rsplit("error: ", 1)[-1]
    try:
        return bool(ask(lambda: _claim(process, text), STALE_SECONDS))
    except Exception:
        return speaks_for_host(process)


def _claim(process: Process, text: str) -> bool:
    """Return True for one of the ranks that report the same text: all of them win the compare_set, and the counter
    picks one."""
    said = process.store.compare_set("failure", "", text).decode()
    return said == text and process.store.add("reporters", 1) == 1
