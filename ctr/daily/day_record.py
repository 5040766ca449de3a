"""Record what a run knows of its days: one record per partition, and how far the pending one has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from tessera.ctr.daily.table_counts import TableCounts
from tessera.ctr.train.state_parts import FoundState, PartState
from tessera.distributed.saved.manifest import TRAINING, CheckpointError, check, is_inside, shown
from tessera.distributed.saved.states import folder_name

COUNTS = ("rows", "positives")
METRICS = ("auc", "logloss", "gauc", "normalized_entropy", "calibration", "pr_auc", "observed_rate")
OF_NUMBERS = ("rows", "mse", "mae")  # of a label that is a number

#: What of a record others count on, as it stands in a saved state.
PATTERN = {
    "partition": str,
    "status": (str, None),
    "fingerprint": (str, None),
    "rows": (int, None),
    "tables": {str: (float, None)},
    "train_seconds": (float, None),
    "published": (str, None),
    "step": (int, None),
}


class Stage(Enum):
    """Progress of a partition. It is done from `TRAINED` on; then its value is the record's `status` on disk."""

    OPENED = "opened"
    EVALUATED = "evaluated"  # with the model of the days before it
    ADMITTED = "admitted"  # the guard lets it through
    TRAINING = "training"  # some of its steps are behind us
    TRAINED = "trained"
    HELD = "held"  # by the guard; it stays to be done
    SKIPPED = "skipped"

    @property
    def is_done(self) -> bool:
        return self in (Stage.TRAINED, Stage.HELD, Stage.SKIPPED)


@dataclass
class DayRecord:
    """One partition: a line of days.jsonl.

    Attributes:
        fingerprint: of its files; None where it was passed over.
        reason: why it was held or skipped, or what was accepted.
        metrics: exact ones of all its rows, by the model of the days before it, COUNTS and METRICS by name; with
            several labels their means, and those of each in `tasks`, OF_NUMBERS of one that is a number.
        known, new: of its rows without and with ids that had no row in the tables; None where there are none.
        tables: when it is done, with rows added and lost since its evaluation; before, with those since there are
            tables.
        train_seconds: so far.
        published: full or delta, or None if it was not. published_bytes: of that publication.
        step: behind which it was done or, before, admitted.
    """

    partition: str
    fingerprint: str | None
    stage: Stage = Stage.OPENED
    reason: str | None = None
    metrics: Mapping[str, Any] | None = None
    known: Mapping[str, Any] | None = None
    new: Mapping[str, Any] | None = None
    tables: TableCounts = field(default_factory=TableCounts)
    samples_per_second: float | None = None
    evaluate_seconds: float | None = None
    train_seconds: float | None = None
    published: str | None = None
    published_bytes: int | None = None
    step: int | None = None

    @property
    def end_step(self) -> int:
        """The step behind which it was done. Ask only of one that is."""
        assert self.step is not None
        return self.step

    def to_json(self) -> dict[str, Any]:
        """Return the record as it is written, with all keys; None for what is not known, or not yet."""
        return {
            "partition": self.partition,
            "status": self.stage.value if self.stage.is_done else None,
            "reason": self.reason,
            "fingerprint": self.fingerprint,
            **(self.metrics or dict.fromkeys(COUNTS + METRICS)),
            "known": self.known,
            "new": self.new,
            "tables": asdict(self.tables),
            "samples_per_second": self.samples_per_second,
            "evaluate_seconds": self.evaluate_seconds,
            "train_seconds": self.train_seconds,
            "published": self.published,
            "published_bytes": self.published_bytes,
            "step": self.step,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: str) -> DayRecord:
        """Read what `to_json` gave. where: it stands, for messages.

        Raises CheckpointError: it is not as this version writes it; a partition's name becomes a folder's.
        """
        check(found, PATTERN, where)
        if "/" in found["partition"] or not is_inside(found["partition"]):
            raise CheckpointError(f"{where} names the partition {shown(found['partition'])}; expected a day or an hour")
        metrics = {name: found.get(name) for name in COUNTS + METRICS}
        if found.get("tasks"):
            check(found["tasks"], {str: {str: (float, None)}}, f"{where}.tasks")
            metrics["tasks"] = found["tasks"]
        names = vars(cls("", "")).keys() - {"stage", "metrics", "tables"}
        as_found: dict[str, Any] = {name: found.get(name) for name in names}
        return cls(
            stage=_stage_of(found, where),
            metrics=None if found["rows"] is None else metrics,
            tables=TableCounts(**{name: found["tables"].get(name) for name in vars(TableCounts())}),
            **as_found,
        )


def _stage_of(found: Mapping[str, Any], where: str) -> Stage:
    """Return the stage of a record on disk, where that of a pending partition follows from what is known of it."""
    done = {stage.value: stage for stage in Stage if stage.is_done}
    if found["status"] is not None:
        if found["status"] not in done:
            raise CheckpointError(f"{where} has status {shown(found['status'])}; expected {', '.join(done)}")
        return done[found["status"]]
    if found["train_seconds"] is not None:
        return Stage.TRAINING
    if found["step"] is not None:
        return Stage.ADMITTED
    return Stage.OPENED if found["rows"] is None else Stage.EVALUATED


def records_of(training: Mapping[str, Any], where: str) -> tuple[list[DayRecord], DayRecord | None]:
    """Return the records of the partitions that are done, and that of the one in work if there is one.

    Args:
        training: what describes a saved state of a run over days; where: its file, for the message.

    Raises CheckpointError, one line: they are not as this version writes them.
    """
    check(training, {"daily": {"records": [{}], "record": ({}, None)}}, where)
    daily = training["daily"]
    records = [DayRecord.from_json(one, f"{where}: record {i}") for i, one in enumerate(daily["records"])]
    record = None if daily["record"] is None else DayRecord.from_json(daily["record"], f"{where}: record")
    if any(not one.stage.is_done or one.step is None for one in records):
        raise CheckpointError(f"{where}: a record has no status or no step, which all that are done have")
    return records, record


class Days:
    """The days of a run, a part of its saved states.

    Attributes:
        done: records of the partitions that are done, in order.
        current: that of the partition in work; None between two.
    """

    def __init__(self, keep_days: int) -> None:
        self._keep_days = keep_days
        self.done: list[DayRecord] = []
        self.current: DayRecord | None = None

    @property
    def trained(self) -> list[DayRecord]:
        return [record for record in self.done if record.stage is Stage.TRAINED]

    def add(self, record: DayRecord) -> None:
        """Add the record of a partition that is done."""
        self.done.append(record)
        self.done.sort(key=lambda one: one.partition)

    def state(self) -> PartState:
        """Return the records; the states of the ends of the last days are kept, for `daily.rollback_to`."""
        records = [record.to_json() for record in self.done]
        daily = {"records": records, "record": self.current and self.current.to_json()}
        return PartState({"daily": daily}, keep={folder_name(one.end_step) for one in self.trained[-self._keep_days :]})

    def load(self, found: FoundState) -> None:
        self.done, self.current = records_of(found.training, f"{found.saved.name}/{TRAINING}")
