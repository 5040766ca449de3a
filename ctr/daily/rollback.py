"""Go back to the end of a day: the state, the published model and the records are those of that moment again."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from tessera.ctr.config import Config
from tessera.ctr.daily.day_record import DayRecord, Stage, records_of
from tessera.ctr.daily.latest import chain_of
from tessera.ctr.daily.publish import point, publications_of
from tessera.ctr.daily.records import FOLDER as DAYS_FOLDER
from tessera.ctr.daily.records import clear_day, day_dir, write_records
from tessera.ctr.data.day_folders import KEY
from tessera.ctr.export.published import problem_of
from tessera.distributed.atomic import sync_file
from tessera.distributed.collectives import on_first_rank
from tessera.distributed.folder_lock import FolderLock
from tessera.distributed.rank import Process
from tessera.distributed.saved.manifest import TRAINING, CheckpointError, read_manifest, read_training
from tessera.distributed.saved.states import discard, names_of_states, open_saved
from tessera.distributed.saved.storage import Storage

ROLLBACKS = "rollbacks.jsonl"


def roll_back(config: Config, process: Process, say: Callable[[str], None]) -> None:
    """Make the end of `daily.rollback_to` the newest state and its publication the one that is served.

    Newer states, publications, records and days' folders are removed; `rollbacks.jsonl` keeps a line. The days behind
    it can be run again. Nothing is removed before the state that remains was read through and its publications were
    found. A rollback that was killed is ended by the same command; a job that goes on instead takes the newest state.

    Raises:
        CheckpointError: no state of the end of that day is kept, or it is damaged. FolderInUse: a job is running.
    """
    key = config.daily.rollback_to
    assert config.trainer.run_dir is not None and key is not None  # or it is no run over days, or no rollback
    run_dir = Path(config.trainer.run_dir)
    root = Storage(config.trainer.checkpoint.folder or run_dir / "checkpoints")
    published, held = publications_of(config, run_dir), []
    on_first_rank(process, lambda: held.append(FolderLock(run_dir)))
    name, records = on_first_rank(process, lambda: _find(root, key))
    open_saved(root.below(name), process)
    on_first_rank(process, lambda: _check_published(published, records, run_dir))
    if process.is_main:
        _remove_newer(run_dir, root, name, key)
        point(published, records, config.daily.keep_days, say)
        write_records(run_dir, records)
        kept = {record.partition for record in records}
        for partition in {folder.name for folder in (run_dir / DAYS_FOLDER).iterdir()} - kept:
            if KEY.fullmatch(partition):  # not what somebody else has put there
                clear_day(run_dir, partition)
        say(f"{run_dir} is at the end of {key} again, {name}; the days behind it can be run again")
        held[0].release()


def _find(root: Storage, key: str) -> tuple[str, list[DayRecord]]:
    """Return the newest state of the end of a day, and its records."""
    kept = []
    for name in names_of_states(root):
        try:
            read_manifest(root.below(name))
            records, in_work = records_of(read_training(root.below(name)), f"{root.below(name).name}/{TRAINING}")
        except CheckpointError:
            continue  # not one to go back to
        trained = [record.partition for record in records if record.stage is Stage.TRAINED]
        if trained and in_work is None:
            if trained[-1] == key:
                return name, records
            kept.append(trained[-1])
    raise CheckpointError(
        f"daily.rollback_to is {key}; {root.name} has no state of the end of that day, "
        f"it has those of {', '.join(kept) or 'none'}"
    )


def _check_published(published: Storage, records: list[DayRecord], run_dir: Path) -> None:
    """Raise CheckpointError where a publication is missing, or its export scored otherwise than evaluation."""
    for name in chain_of(records):
        problem = problem_of(day_dir(run_dir, name), read_manifest(published.below(name))["checksum"])
        if problem is not None and name == chain_of(records)[-1]:
            raise CheckpointError(f"daily.rollback_to: {problem}; choose a day before it")


def _remove_newer(run_dir: Path, root: Storage, name: str, key: str) -> None:
    """Newest first, so that what remains is at any time a run up to some moment."""
    newer = [one for one in names_of_states(root) if one > name]
    if newer:
        line = {"to": key, "from_state": newer[0], "to_state": name, "at": datetime.now(timezone.utc).isoformat()}
        with open(run_dir / ROLLBACKS, "a") as file:
            file.write(json.dumps(line) + "\n")
        sync_file(run_dir / ROLLBACKS)
    for one in newer:
        discard(root, one)
