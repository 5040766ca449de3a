"""Start the ranks of a script by forking this process, which has imported all, and watch them."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.ranks import ROOT, free_port

#: A rank that died is found sooner than in a real job.
QUICK = {"STALE_SECONDS": 4.0, "HEARTBEAT_SECONDS": 0.1, "LEAVE_SECONDS": 0.5}


class Started:
    """Ranks of `python script arguments...` from the repository's root, both outputs in one file."""

    def __init__(self, command: list[str], ranks: int, output: Path) -> None:
        self._output = output
        output.unlink(missing_ok=True)
        port = free_port()
        sys.stdout.flush()
        self._statuses: dict[int, int] = {}
        self._pids = [_fork(command, rank, ranks, port, output) for rank in range(ranks)]

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses in rank order, -9 for a rank that was killed; None for one that runs still."""
        end = time.monotonic() + seconds
        while len(self._statuses) < len(self._pids) and time.monotonic() < end:
            for pid in set(self._pids) - set(self._statuses):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._statuses[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return [self._statuses.get(pid) for pid in self._pids]

    def kill(self, ranks: Iterable[int] | None = None) -> None:
        """SIGKILL; without `ranks` all that are left, and wait for them."""
        for rank in range(len(self._pids)) if ranks is None else ranks:
            if self._pids[rank] not in self._statuses:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pids[rank], signal.SIGKILL)
        if ranks is None:
            self.wait(30)

    def said(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""


def _fork(command: list[str], rank: int, ranks: int, port: int, output: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.chdir(ROOT)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        if ranks > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        from tessera.distributed import heartbeat

        for name, value in QUICK.items():
            setattr(heartbeat, name, value)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)
