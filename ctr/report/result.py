"""Write the result of a run, its predictions and its report, and put it in the place of an earlier one as a whole.

The new result is written into a folder of its own. Its renaming is the moment from which it counts: before it, the old
result is the result; after it, the new one is, and whoever opens the run next puts its pieces in their places where a
kill came in between. All old pieces leave before the first new one arrives, so that no moment shows some of each.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tessera.distributed.atomic import sync_folder

PREDICTIONS = "predictions"
TASKS = "tasks"  # in place of them where there are several labels: a folder for each answer
CALIBRATION = "calibration.json"  # what the metrics were before it (ctr/train/calibrate.py)
PIECES = (PREDICTIONS, TASKS, CALIBRATION, "report.json", "report.html")
# The stages of a new result, in order: being written, complete, and the old one out of its way.
PARTIAL, COMPLETE, PLACING = ".partial-result", ".complete-result", ".placing-result"
REPLACED = ".replaced-result"


def answer_folder(predictions: Path, name: str) -> Path:
    """Return where the predictions of one answer of several lie: in a folder beside, which is a run's folder in small.
    name: of the answer; "" of a single label, whose predictions lie in `predictions` itself."""
    return predictions.parent / TASKS / name / predictions.name if name else predictions


def begin_result(run_dir: Path) -> Path:
    """Return an empty folder for a new result of this run. What an earlier attempt left there is removed."""
    settle_result(run_dir)
    partial = run_dir / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def commit_result(run_dir: Path) -> None:
    """Make the new result, whose files are all written and durable, the result of the run."""
    partial = run_dir / PARTIAL
    for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_folder(folder)
    os.rename(partial, run_dir / COMPLETE)
    sync_folder(run_dir)
    settle_result(run_dir)


def settle_result(run_dir: Path) -> None:
    """Bring a complete result to its place, if a kill came before it was there. Call it before reading a result."""
    complete, placing, replaced = run_dir / COMPLETE, run_dir / PLACING, run_dir / REPLACED
    if complete.is_dir():
        replaced.mkdir(exist_ok=True)
        for name in PIECES:
            if (run_dir / name).exists():
                os.rename(run_dir / name, replaced / name)
        os.rename(complete, placing)
    if placing.is_dir():
        for piece in placing.iterdir():
            os.rename(piece, run_dir / piece.name)
        placing.rmdir()
        sync_folder(run_dir)
    if replaced.is_dir():
        shutil.rmtree(replaced)
