"""Start, agreement on failure, and clean end of the ranks of one job.

Ranks run under `torchrun`, or alone without it. Each publishes a heartbeat and the stage it is in to the job's
store, so that whoever survives a failure can say which rank stopped and where.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from embedding.errors import ConfigError, TesseraError

T = TypeVar("T")

HEARTBEAT_SECONDS = 1.0
STALE_SECONDS = 5.0  # a rank silent for this long is taken for dead
LEAVE_SECONDS = 20.0  # how long a rank may still hang in a collective after another one reported failure
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
STOPPED = 75  # exit status of a rank that was asked to stop, saved its state and can go on later (EX_TEMPFAIL)


class RankFailure(TesseraError):
    """Another rank died or hung; the message names it and the stage it was last seen in."""


class Terminated(BaseException):
    """SIGTERM arrived: the launcher ends this rank, usually because another one failed."""


class Stopped(BaseException):
    """All ranks leave in agreement and nothing is unsaved; `run` returns the status: 75 if they were asked to stop."""

    def __init__(self, status: int = STOPPED) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class Process:
    """This rank's place in the job. `stage` is free text ("step 120: backward") shown when the rank fails.

    With `can_stop_later` the first SIGTERM sets `stop_asked`, and whoever set it leaves by `Stopped` when the state is
    saved; without, and at the second SIGTERM, the rank ends at once.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    store: dist.Store
    stage: str = "start"
    can_stop_later: bool = False
    stop_asked: bool = False
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_sigterm(self, _signal: int, _frame: object) -> None:
        if not self.can_stop_later or self.stop_asked:
            raise Terminated
        self.stop_asked = True


def start(device: str = "auto", timeout_seconds: float = 300.0) -> Process:
    """Join the job's process group (gloo on the CPU, nccl beside it on GPUs) and begin to publish heartbeats.

    Raises:
        ConfigError: the device is not there.
    """
    keep_freed_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _choose_device(device, local_rank)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.HashStore()
    if "MASTER_ADDR" in os.environ:
        store, rank, world = next(rendezvous("env://", timeout=timeout))
    # torchrun's store outlives the ranks: without this, restarted ones would find the addresses of those before.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"restart/{restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    store = dist.PrefixStore("tessera", dist.distributed_c10d._get_default_store())
    process = Process(rank, local_rank, world, chosen, store)
    if world > 1:
        _beat(process)
        threading.Thread(target=_heartbeat, args=(process,), daemon=True, name="heartbeat").start()
        dist.barrier()  # from here on every rank's heartbeat exists
    return process


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
        raise ConfigError("trainer.device is cuda but torch finds no GPU here; run scripts/doctor.py")
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
    has saved its state (or what `Stopped` says), 1 for anything else.

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
        signal.signal(signal.SIGTERM, process.on_sigterm)
        status = 0
        try:
            main(config, process)
        except Stopped as stopped:
            status = stopped.status
        stop(process)  # here, where no exception's frames hold on to the model any more
        return status
    except KeyboardInterrupt:
        return 130
    except (Exception, Terminated) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends survivors while they find out why
        status, line = _explain(error, process)
        leave(process, line, status)


def leave(process: Process | None, line: str, status: int = 1) -> NoReturn:
    """End this rank from whatever thread. The line is said once for the whole job."""
    if _first_to_report(process, line):
        say(line)
    if process is not None:
        process._ended.set()
    sys.stdout.flush()
    sys.stderr.flush()
    # A failed rank's process group cannot be closed in agreement with the others; leave at once so that
    # their collectives fail at once, instead of in destructors that may wait.
    os._exit(status)


def job_store() -> dist.Store:
    """A store that outlives restarts of the ranks by torchrun (`Process.store` is new after each)."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.PrefixStore("tessera", store)


def say(line: str) -> None:
    """Print the job's last word to stderr; under torchrun after the launcher's own trace, so that it is not buried."""
    if "\n" not in line:  # else a traceback
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in line).split())
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        print(line, file=sys.stderr, flush=True)
        return
    message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
    with open(error_file, "w") as file:  # torchrun shows it as the root cause
        json.dump({"message": message}, file)
    # The launcher may stay a zombie until its own parent has read all output, ours included: that counts as gone.
    wait_then_print = """
import os, sys, time
def running(pid):
    try:
        os.kill(pid, 0)
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return sys.platform != "linux"
    except OSError:
        return False
end = time.time() + 40
while running(int(sys.argv[1])) and time.time() < end:
    time.sleep(0.05)
print(sys.argv[2], file=sys.stderr)
"""
    command = [sys.executable, "-I", "-S", "-c", wait_then_print, str(os.getppid()), line]
    subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise Terminated


def _explain(error: BaseException, process: Process | None) -> tuple[int, str]:
    """The exit status and the line for an error on this rank; for a broken collective, find the rank to blame."""
    if isinstance(error, TesseraError):
        return 2, f"error: {error}"
    if "device-side assert" in str(error):  # no other call to the GPU would succeed, so nothing can be asked of it
        where = f"rank {process.rank}, {process.stage}: " if process else ""
        return 1, (
            f"error: {where}the GPU stopped at a failed assertion, which it printed above (a loss or gradient that is "
            "not finite, or a number out of range); nothing was updated with it, and saved states are as they were"
        )
    if process is not None and process.world_size > 1:
        blamed = _find_failed_rank(process, _is_broken_collective(error) or isinstance(error, Terminated))
        if blamed:
            seen = f" (rank {process.rank} saw: {_first_line(error)})" if "did not answer" in blamed else ""
            return 1, f"error: {blamed}{seen}"
    if isinstance(error, Terminated):
        where = f" during {process.stage}" if process else ""
        return 143, f"stopped by SIGTERM{where}"
    where = f"rank {process.rank}, {process.stage}: " if process else ""
    return 1, f"{traceback.format_exc()}error: {where}{type(error).__name__}: {error}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _is_broken_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "Connection closed", "Connection reset", "Timed out waiting", "NCCL", "ProcessGroup")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _find_failed_rank(process: Process, others_to_blame: bool) -> str | None:
    """Wait until another rank reports, or its heartbeat goes stale, or (all alive) name the one that lags."""
    if not others_to_blame:
        return None
    deadline = time.monotonic() + STALE_SECONDS + 3 * HEARTBEAT_SECONDS
    others = [rank for rank in range(process.world_size) if rank != process.rank]
    beats = {}
    seen_change = {rank: time.monotonic() for rank in others}
    while time.monotonic() < deadline:
        try:
            if process.store.check(["failure"]):
                return process.store.get("failure").decode()
            for rank in others:
                beat = process.store.get(f"alive/{rank}").decode()
                if beats.get(rank) not in (None, beat):
                    seen_change[rank] = time.monotonic()
                beats[rank] = beat
        except Exception:  # the store died with its host, rank 0's machine
            return f"the job's store on the first host is gone; rank {process.rank} was at {process.stage}"
        for rank in others:
            if time.monotonic() - seen_change[rank] > STALE_SECONDS:
                stage = json.loads(beats[rank])["stage"]
                return f"rank {rank} died (no heartbeat for {STALE_SECONDS:.0f} s); it was last at {stage}"
        time.sleep(0.2)
    stages = {rank: json.loads(beats[rank]) for rank in others}
    slow = max(others, key=lambda rank: stages[rank]["seconds"])
    if stages[slow]["seconds"] < STALE_SECONDS:
        return None
    return f"rank {slow} did not answer; it has been at {stages[slow]['stage']} for {stages[slow]['seconds']:.0f} s"


def _first_to_report(process: Process | None, line: str) -> bool:
    """True for the one rank of the job that shall print. Without a store (start failed), rank 0."""
    if process is None:
        return int(os.environ.get("RANK", 0)) == 0
    if process.world_size == 1:
        return True
    try:
        text = line.rsplit("error: ", 1)[-1]
        return process.store.compare_set("failure", "", text).decode() == text and _claim(process)
    except Exception:
        return True


def _claim(process: Process) -> bool:
    """Ranks that report the same text all win the compare_set; the counter picks one of them."""
    return process.store.add("reporters", 1) == 1


def _beat(process: Process) -> None:
    stage = process.stage
    if stage != getattr(process, "_beat_stage", None):
        process._beat_stage, process._beat_since = stage, time.monotonic()
    # Hosts' clocks differ and may jump: how long a stage has lasted is told, not since when.
    beat = {"at": time.monotonic(), "stage": stage, "seconds": time.monotonic() - process._beat_since}
    process.store.set(f"alive/{process.rank}", json.dumps(beat))


def _heartbeat(process: Process) -> None:
    failed_at = None
    while not process._ended.wait(HEARTBEAT_SECONDS):
        try:
            _beat(process)
            if failed_at is None and process.store.check(["failure"]):
                failed_at = time.monotonic()
        except Exception:
            return  # the store is gone; the main thread's collectives fail by themselves
        if failed_at is not None and time.monotonic() - failed_at > LEAVE_SECONDS:
            os._exit(1)  # another rank reported why; this one hangs in a collective that will never complete
