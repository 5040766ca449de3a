"""Run `tessera train` as a process of its own, and follow the metric of its evaluations while it trains."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tessera.ctr.metrics.steering import steering_value

POLL_SECONDS = 0.5
LEAVE_SECONDS = 120.0  # for a run that is asked to stop, which saves its state first
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class TrialFailed(Exception):
    """A run ended with an error; its text is the run's last line."""


def evaluations_of(folder: Path, metric: str) -> list[float]:
    """Return the metric of each evaluation on the valid split while training, in order; undefined ones are left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    by_step = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # is being written
        if line["kind"] == "eval" and line["split"] == "valid" and "model" not in line:
            by_step[line["step"]] = steering_value(line, metric)
    return [value for _, value in sorted(by_step.items()) if value is not None]


def run_trial(
    launcher: str, overrides: Sequence[str], folder: Path, metric: str, watch: Callable[[list[float]], bool]
) -> bool:
    """Train in `folder`, going on with what is there, and return whether the run came to its end.

    watch: told of the metric of all evaluations so far, again and again; the run is ended when it returns true.

    Raises TrialFailed: the run ended otherwise.
    """
    command = [*launcher.split(), "-m", "tessera.scripts.train", *overrides]
    command += [f"trainer.run_dir={folder}", "trainer.resume=auto"]
    print(" ".join(command), file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    errors = folder.with_suffix(".err")
    with open(errors, "w") as file:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, preexec_fn=_end_with_parent)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    run.wait(POLL_SECONDS)
                ended = run.poll() is not None
                if watch(evaluations_of(folder, metric)) and not (ended and run.returncode):
                    run.kill()  # torchrun's ranks end with it
                    return False
                if ended:
                    break
        except BaseException:
            _stop(run)
            raise
        finally:
            run.wait()
    if run.returncode:
        lines = errors.read_text(errors="replace").strip().splitlines() or ["no message"]
        raise TrialFailed(lines[-1])
    errors.unlink()
    return True


def _stop(run: subprocess.Popen[bytes]) -> None:
    run.terminate()
    try:
        run.wait(LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        run.kill()


def _end_with_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
