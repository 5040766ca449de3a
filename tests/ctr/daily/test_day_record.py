"""Records of days as they stand on disk."""

import json

import pytest

from tessera.ctr.daily.day_record import COUNTS, METRICS, DayRecord, Days, Stage, records_of
from tessera.ctr.daily.table_counts import TableCounts
from tessera.distributed.saved.manifest import CheckpointError

MEASURED = dict.fromkeys(COUNTS + METRICS, 3)
TABLES = TableCounts(rows=7, bytes=280, new=2, expired=1)
KEYS = ["partition", "status", "reason", "fingerprint", *COUNTS, *METRICS, "known", "new", "tables"]
KEYS += ["samples_per_second", "evaluate_seconds", "train_seconds", "published", "published_bytes", "step"]
EVALUATED = {"metrics": MEASURED, "known": MEASURED, "tables": TABLES, "evaluate_seconds": 0.5}
RECORDS = [
    DayRecord("2026-01-01", "f"),
    DayRecord("2026-01-01", "f", Stage.EVALUATED, **EVALUATED),
    DayRecord("2026-01-01", "f", Stage.ADMITTED, "accepted although", **EVALUATED, step=4),
    DayRecord("2026-01-01", "f", Stage.TRAINING, **EVALUATED, step=4, train_seconds=1.5),
    DayRecord("2026-01-01T05", "f", Stage.TRAINED, **EVALUATED, step=9, train_seconds=1.5, published="full"),
    DayRecord("2026-01-01", "f", Stage.HELD, "auc is low", **EVALUATED, step=4),
    DayRecord("2026-01-01", None, Stage.SKIPPED, "daily.skip", step=4),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stage.value)
def test_a_record_reads_back_with_its_stage(record):
    written = record.to_json()
    assert list(written) == KEYS
    assert written["status"] == (record.stage.value if record in RECORDS[4:] else None)
    assert DayRecord.from_json(json.loads(json.dumps(written)), "here") == record


def test_days_read_back():
    days = Days(keep_days=1)
    for number in (2, 1, 3):
        days.add(DayRecord(f"2026-01-0{number}", "f", Stage.TRAINED, **EVALUATED, step=number, train_seconds=1.0))
    days.add(DayRecord("2026-01-04", None, Stage.SKIPPED, step=3))
    days.current = RECORDS[3]
    state = days.state()
    assert records_of(json.loads(json.dumps(state.training)), "here") == (days.done, days.current)
    assert [record.partition[-2:] for record in days.done] == ["01", "02", "03", "04"]
    assert state.keep == {"step-000000000003"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "done"}, 'here has status "done"; expected trained, held, skipped'),
        ({"partition": "../2026-01-01"}, 'here names the partition "../2026-01-01"; expected a day or an hour'),
        ({"step": "4"}, "step"),
    ],
)
def test_what_is_no_record_is_one_line(changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        DayRecord.from_json(RECORDS[4].to_json() | changes, "here")
    assert "\n" not in str(error.value)


def test_what_is_done_has_a_status_and_a_step():
    for record in (RECORDS[1], DayRecord("2026-01-01", "f", Stage.TRAINED)):
        daily = {"records": [record.to_json()], "record": None}
        with pytest.raises(CheckpointError, match="a record has no status or no step"):
            records_of({"daily": daily}, "here")
