"""One job per folder, on one host and on two; the lock of a dead job does not stop the next."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from tessera.distributed import folder_lock
from tessera.distributed.folder_lock import FolderInUse, FolderLock
from tests.ranks import ROOT

HOLD = """
import sys, time
from pathlib import Path
from tessera.distributed.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_job_is_told_who_has_the_folder_until_that_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(FolderInUse) as error:
        FolderLock(tmp_path)
    who = f"process {holder.pid} on {socket.gethostname()}"
    assert str(error.value) == f"{tmp_path} is in use by {who}; two jobs never share a folder"
    holder.kill()
    holder.wait()
    FolderLock(tmp_path).release()
    FolderLock(tmp_path).release()


def test_a_lock_of_another_host_is_stale_when_no_beat_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 1.2)
    lock = tmp_path / folder_lock.NAME
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "beat": 7}))
    FolderLock(tmp_path).release()

    def beat() -> None:
        for number in range(30):
            lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "beat": number}))
            time.sleep(0.1)

    beating = threading.Thread(target=beat)
    beating.start()
    time.sleep(0.3)
    with pytest.raises(FolderInUse, match="process 1 on elsewhere"):
        FolderLock(tmp_path)
    beating.join()
