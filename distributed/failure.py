"""Describe an error that ends a rank in one line: what happened, where, and what to do.

A mistake of the user's is a `TesseraError` and says all that itself. What the machine runs out of, and what a disk
refuses, comes up in any place as one of many types; here they become lines, so that no place needs to know of it.
"""

from __future__ import annotations

import errno
import os
import resource
import traceback
from collections.abc import Iterator
from typing import TypeAlias

import torch
import torch.distributed as dist

from tessera.distributed.heartbeat import find_failed_rank
from tessera.distributed.meeting import RankFailure
from tessera.distributed.rank import Process, Terminated
from tessera.embedding.errors import TesseraError

#: A resource that can run out: its name, numbers of OSErrors, words in messages of other errors, and what to do.
Resource: TypeAlias = tuple[str, tuple[int, ...], tuple[str, ...], str]
MEMORY: Resource = (
    "out of memory",
    (errno.ENOMEM,),
    ("bad_alloc", "can't allocate memory", "Cannot allocate memory", "malloc of size", "realloc of size"),
    "give the job more memory (ulimit -v, the limit of its container or job), or lower trainer.batch_size, "
    "data.window_rows, data.threads or the rows of the tables",
)
THREADS: Resource = (
    "out of threads",
    (errno.EAGAIN,),
    ("can't start new thread", "Resource temporarily unavailable", "pthread_create failed"),
    "raise the limit of processes and threads (ulimit -u, the pids limit of its container), or lower trainer.threads "
    "and data.threads",
)
FILES: Resource = (
    "out of open files",
    (errno.EMFILE, errno.ENFILE),
    ("Too many open files", "too many open files"),
    "raise the limit of open files (ulimit -n), for example to 4096",
)
GPU_MEMORY: Resource = (
    "out of GPU memory",
    (),
    ("CUDA out of memory", "CUDA error: out of memory"),
    "lower trainer.batch_size, or give tables a cache (embedding.cache_rows)",
)
EXHAUSTED = (GPU_MEMORY, MEMORY, THREADS, FILES)

DISK_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space, or choose a folder on another disk",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that this user can read and write",
    errno.EPERM: "choose a folder that this user can read and write",
    errno.ENOENT: "it, or the folder that it was in, is not there any more",
    errno.EIO: "look at the disk or at its mount",
    errno.ESTALE: "look at the disk or at its mount",
    errno.ENOTCONN: "look at the disk or at its mount",
}


def explain(error: BaseException, process: Process | None) -> tuple[int, str]:
    """Return the exit status and the line for an error on this rank; for a broken collective, find the rank to
    blame."""
    ran_out = exhausted(error)
    if isinstance(error, TesseraError):
        remedy = f"; {ran_out[0]}: {ran_out[3]}" if ran_out else ""
        return 1 if isinstance(error, RankFailure) else 2, f"error: {error}{remedy}"
    where = f"rank {process.rank}, {process.stage}: " if process else ""
    if "device-side assert" in str(error):  # no other call to the GPU would succeed, so nothing can be asked of it
        return 1, (
            f"error: {where}the GPU stopped at a failed assertion, which it printed above (a loss or gradient that is "
            "not finite, or a number out of range); nothing was updated with it, and saved states are as they were"
        )
    if ran_out:
        return 1, f"error: {where}{ran_out[0]} ({first_line(error)}); {ran_out[3]}; saved states are as they were"
    broken = is_broken_collective(error)
    if process is not None and process.world_size > 1 and (broken or isinstance(error, Terminated)):
        blamed = find_failed_rank(process)
        if blamed:
            return 1, f"error: {blamed}"
        if broken:
            return 1, (
                f"error: {where}the connection to another rank broke, and all ranks are alive; look at the network "
                f"between them ({first_line(error)})"
            )
    if isinstance(error, Terminated):
        return 143, f"stopped by SIGTERM{f' during {process.stage}' if process else ''}"
    if isinstance(error, OSError) and not isinstance(error, dist.DistError):
        return 1, f"error: {where}{of_disk(error, process.folder if process else None)}"
    return 1, f"{''.join(traceback.format_exception(error))}error: {where}{type(error).__name__}: {error}"


def exhausted(error: BaseException) -> Resource | None:
    """Return which resource of EXHAUSTED ran out, also if another error was raised from that one; None if none did."""
    for one in _chain(error):
        if isinstance(one, torch.OutOfMemoryError):
            return GPU_MEMORY
        if isinstance(one, MemoryError):
            return MEMORY
        says = str(one) if isinstance(one, OSError | RuntimeError | TesseraError) else ""
        for kind in EXHAUSTED:
            if any(words in says for words in kind[2]) or (isinstance(one, OSError) and one.errno in kind[1]):
                return MEMORY if kind is THREADS and _no_room_for_a_stack() else kind
    return None


def _no_room_for_a_stack() -> bool:
    """Return whether a thread failed to start because of a limit on the address space, not on the number of threads."""
    limit, stack = (resource.getrlimit(one)[0] for one in (resource.RLIMIT_AS, resource.RLIMIT_STACK))
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return False
    return used + (stack if stack > 0 else 8 << 20) > limit


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def of_disk(error: OSError, folder: str | None) -> str:
    """Return a line for an error of a disk, a file system or a stream. Writing to an open file fails without a name:
    then it is in `folder`, to which the command writes."""
    path = error.filename or error.filename2 or folder
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    why = os.strerror(error.errno) if error.errno else " ".join(str(error).split()) or type(error).__name__
    remedy = DISK_REMEDIES.get(error.errno or 0)
    line = f"{path}: {why}" if path else why
    return f"{line}; {remedy}; saved states are as they were" if remedy else line


def of_start(error: Exception, rank: int) -> str | None:
    """Return a line that says why the ranks' store cannot be reached or opened; None for other errors."""
    text = str(error)
    at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return (
            f"rank {rank} cannot open the job's store at {at}: the port is in use by another program or another job; "
            "choose another one by MASTER_PORT, or by --master-port or --rdzv-endpoint of torchrun"
        )
    if is_broken_collective(error) or isinstance(error, TimeoutError):
        return (
            f"rank {rank} cannot reach the job's store at {at} ({first_line(error)}); is the first host up, and the "
            "port open to this one?"
        )
    return None


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def is_broken_collective(error: BaseException) -> bool:
    """Return whether an error means that the other side of a collective, or of the store, went away or did not
    answer."""
    if isinstance(error, dist.DistError):
        return True
    words = ["gloo", "Connection closed", "Connection reset", "Timed out waiting", "NCCL", "ProcessGroup"]
    words += ["pair closure", "Application timeout", "Broken pipe"]
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
