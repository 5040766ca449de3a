"""Allow one job per folder; the error of a second job names the first.

The kernel holds the lock (flock), and lets go of it when the process ends in whatever way. Not every file system shares
such locks between hosts, so the file also tells who holds it, and the holder writes a new beat every few seconds: a
lock of another host is stale when no new beat is seen for a while. Clocks are not compared.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tessera.embedding.errors import TesseraError

NAME = ".lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 16.0


class FolderInUse(TesseraError):
    """Raised when another job writes to the folder."""


class FolderLock:
    """A lock on a folder, held from construction to `release` or the end of the process.

    path: of the lock's file, if not `.lock` in the folder.

    Raises:
        FolderInUse: naming host and process of the job that holds it.
    """

    def __init__(self, folder: Path, wait_seconds: float = 0.0, path: Path | None = None) -> None:
        self._folder, self._path = folder, path or folder / NAME
        self._file = open(self._path, "a+")  # noqa: SIM115 (open as long as the lock is held)
        self._wait_for_flock(time.monotonic() + wait_seconds)
        self._wait_for_other_host()
        self._beat_number = 0
        self._write()
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="folder lock").start()

    def release(self) -> None:
        self._released.set()
        self._file.seek(0)
        self._file.truncate()
        self._file.close()

    def _wait_for_flock(self, end: float) -> None:
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            if time.monotonic() >= end:  # behind the error, whose number would be taken for a resource that ran out
                self._file.close()
                raise FolderInUse(self._refusal())
            time.sleep(0.2)

    def _wait_for_other_host(self) -> None:
        holder = self._holder()
        if not holder or holder.get("host") == socket.gethostname():
            return  # on this host the lock tells the truth
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(0.5)
            if self._holder() != holder:
                self._file.close()
                raise FolderInUse(self._refusal())

    def _holder(self) -> dict[str, Any]:
        try:
            said: dict[str, Any] = json.loads(self._path.read_text() or "{}")
        except (OSError, ValueError):
            return {}
        return said

    def _refusal(self) -> str:
        holder = self._holder()
        who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder else "another process"
        return f"{self._folder} is in use by {who}; two jobs never share a folder"

    def _write(self) -> None:
        self._beat_number += 1
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "beat": self._beat_number})
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                self._write()
            except (OSError, ValueError):  # a full disk; or released just now
                continue
