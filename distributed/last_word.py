"""Print the job's last word: one line on stderr, behind all output of the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

# The launcher may stay a zombie until its own parent has read all output, ours included: that counts as gone.
WAIT_THEN_PRINT = """
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


def say(line: str) -> None:
    """Print the job's last word to stderr; under torchrun after the launcher's own trace, so that it is not buried."""
    if "\n" not in line:  # else a traceback
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in line).split())
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    restarts = [int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if not error_file or restarts[0] < restarts[1]:  # a launcher that starts its ranks again shows no trace
        with suppress(OSError, ValueError):  # a full disk, or nobody reads any more
            print(line, file=sys.stderr, flush=True)
        return
    message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
    with suppress(OSError), open(error_file, "w") as file:  # torchrun shows it as the root cause
        json.dump({"message": message}, file)
    command = [sys.executable, "-I", "-S", "-c", WAIT_THEN_PRINT, str(os.getppid()), line]
    try:
        subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
    except (OSError, MemoryError):  # no memory or no process left for it
        print(line, file=sys.stderr, flush=True)
