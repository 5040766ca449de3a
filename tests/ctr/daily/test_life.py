"""The whole life of a run over days, on 1 and 2 ranks: what is trained, held, passed over, published, undone."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tessera.ctr.daily.serve import apply
from tessera.distributed.rank import Process
from tests.ctr.daily.days import (
    assert_same_life,
    command,
    key_of,
    predictions,
    records,
    served,
    times_trained,
    without_gauges,
    write_day,
    write_days,
)
from tests.ctr.train.states import newest, rows_of_state, tensors_of_state, training_of_state
from tests.ctr.train.warm_ranks import WarmRanks
from tests.ranks import run_script

ROWS = 300
#: Without the column whose ids are all new, and with a guard that acts.
GUARDED = ["data.schema.features=[{name: x, kind: numeric}, {name: c, kind: id}, {name: d, kind: id}]"]
GUARDED += ["daily.bands.window=5", "daily.bands.min_days=2", "daily.bands.auc=0.12", "daily.bands.logloss=0.25"]


@pytest.fixture(scope="module")
def ranks():
    server = WarmRanks("daily")
    yield server
    server.close()


def retrained(
    ranks: WarmRanks, data: Path, run_dir: Path, *more: str, world: int = 1, status: int = 0, end=None
) -> str:
    """What the job says."""
    run_dir.parent.mkdir(exist_ok=True)
    output = run_dir.parent / f"output-{run_dir.name}"
    output.unlink(missing_ok=True)
    statuses = ranks.run(world, command(data, run_dir, *more), output, end=end)
    assert statuses == [status] * world, output.read_text()
    return output.read_text()


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory) -> Path:
    """5 days on 2 ranks, whole models on days 1 and 4; the folder holds data and run."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_days(folder / "data", 5, ROWS)
    retrained(ranks, data, folder / "run", "daily.full_every=3", "daily.epochs=2", world=2)
    return folder


def test_a_run_over_days_keeps_what_it_promises(whole):
    lines = records(whole / "run")
    assert [line["partition"] for line in lines] == [key_of(day) for day in range(5)]
    assert [line["status"] for line in lines] == ["trained"] * 5
    assert [line["published"] for line in lines] == ["full", "delta", "delta", "full", "delta"]
    assert [line["step"] for line in lines] == [12, 24, 36, 48, 60]  # 6 batches, twice
    expected = {"partition", "status", "reason", "fingerprint", "rows", "positives", "auc", "logloss", "gauc",
                "normalized_entropy", "calibration", "pr_auc", "observed_rate", "known", "new", "tables",
                "samples_per_second", "evaluate_seconds", "train_seconds", "published", "published_bytes",
                "step"}  # fmt: skip
    for line in lines:
        assert line.keys() == expected
        assert line["rows"] == line["new"]["rows"] == ROWS  # every row has an id of its own
        assert line["tables"].keys() == {"rows", "bytes", "new", "expired"}
    assert sum(line["tables"]["new"] - line["tables"]["expired"] for line in lines) == lines[-1]["tables"]["rows"]
    assert lines[-1]["tables"]["expired"] > 0
    assert lines[-1]["auc"] > lines[0]["auc"]
    # embedding.ttl_days=3: of days 1 and 2 nothing is left but what has been seen again, of the others each row twice
    trained = times_trained(newest(whole / "run"), 5, ROWS)
    assert trained[2:] == [[2] * ROWS] * 3 and trained[0] == [0] * ROWS
    events = EventAccumulator(str(next((whole / "run").rglob("events.out.tfevents*")).parent)).Reload()
    shown = {event.step: event.value for event in events.Scalars("day/published_bytes")}
    assert shown == pytest.approx({n: line["published_bytes"] for n, line in enumerate(lines, 1)})
    assert (whole / "run" / "published" / "latest").exists() and not list((whole / "run").glob("**/.partial-*"))


@pytest.mark.slow
def test_progressive_predictions_are_those_of_the_model_before_the_day(whole, ranks, tmp_path):
    """A job that ends with day 2 leaves the model that day 3 is evaluated with."""
    found = predictions(whole / "run")
    assert sorted(found) == [
        f"days/{key_of(d)}/predictions/{key_of(d)}-{r:05d}.parquet" for d in range(5) for r in (0, 1)
    ]
    options = ["daily.full_every=3", "daily.epochs=2"]
    retrained(ranks, whole / "data", tmp_path / "run", *options, f"daily.to={key_of(1)}", world=2)
    assert len(records(tmp_path / "run")) == 2
    said = retrained(ranks, whole / "data", tmp_path / "run", *options, world=2)
    assert "step 24 · goes on from" in said
    assert_same_life(tmp_path / "run", whole / "run")


def test_a_day_that_is_done_is_passed_over(whole, ranks, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    before = served(tmp_path / "run"), records(tmp_path / "run"), tensors_of_state(newest(tmp_path / "run"))
    said = retrained(ranks, whole / "data", tmp_path / "run", "daily.full_every=3", "daily.epochs=2", world=2)
    assert "all 5 partitions up to 2026-01-05 are done; nothing to do" in said
    assert before == (served(tmp_path / "run"), records(tmp_path / "run"), tensors_of_state(newest(tmp_path / "run")))


def applied(whole: Path, output: Path) -> str:
    """What scripts/apply_delta.py says."""
    return apply(str(whole / "run" / "published"), output, Process(0, 0, 1, torch.device("cpu"), dist.HashStore()))


def same_model(folder: Path, state: Path) -> None:
    """Values, ids, counts and times of a served model and of a state of other ranks; the dense side."""
    mine, other = rows_of_state(folder, numbers=False), rows_of_state(state, numbers=False)
    for rows in other.values():
        for row in rows.values():
            row.pop("state")
    assert mine == other
    assert tensors_of_state(folder, "tower/") == tensors_of_state(state, "tower/")


def test_whole_model_and_changes_are_the_live_model(whole, ranks, tmp_path):
    """Published by 2 ranks, read by 1."""
    done = run_script("scripts/apply_delta.py", str(whole / "run" / "published"), str(tmp_path / "served"))
    assert "the whole model and 1 publication(s) of changes" in done.stdout, done.stderr
    same_model(tmp_path / "served", newest(whole / "run"))
    assert "served is 2026-01-05 already" in applied(whole, tmp_path / "served")


@pytest.mark.slow
def test_changes_are_applied_one_after_the_other(whole, ranks, tmp_path):
    step, output = tmp_path / "step", tmp_path / "model"
    for day in range(3):
        options = ["daily.full_every=3", "daily.epochs=2", f"daily.to={key_of(day)}"]
        retrained(ranks, whole / "data", step / "run", *options, world=2)
        said = applied(step, output)
        assert (f"{key_of(day - 1)} and 1 publication(s)" if day else "the whole model and 0") in said
        same_model(output, newest(step / "run"))
    gone = sorted((step / "run" / "published").glob(f"{key_of(2)}/gone/*/*.parquet"))
    assert len(gone) == 6
    # The next ranks are others: they publish a whole model, and the served copy follows.
    retrained(ranks, whole / "data", step / "run", "daily.full_every=9", f"daily.to={key_of(3)}", world=1)
    assert records(step / "run")[3]["published"] == "full"
    applied(step, output)
    same_model(output, newest(step / "run"))


def test_tombstones_of_expired_ids(ranks, tmp_path):
    data = write_days(tmp_path / "data", 5, 120)
    retrained(ranks, data, tmp_path / "run", "daily.full_every=9", "trainer.checkpoint.full_every=3", world=2)
    gone = [pq.read_table(p)["id"].to_pylist() for p in (tmp_path / "run/published").glob("*/gone/row/*.parquet")]
    gone = sorted(i for ids in gone for i in ids)
    held = rows_of_state(newest(tmp_path / "run"))["row"].keys()
    # embedding.ttl_days=3: all of day 1, those of day 2 whose own events lie three days before the clock or more
    now = training_of_state(newest(tmp_path / "run"))["progress"]["now"]
    rows = pq.read_table(data, columns=["row", "time"])
    times = rows["time"].to_numpy() - (now - 3 * 86400)
    # The newest rows of a batch count as seen at the clock, a little before their time.
    assert set(rows["row"].to_numpy()[times <= 0]) <= set(gone) <= set(rows["row"].to_numpy()[times <= 3600])
    assert gone == sorted({d * 1_000_000 + i for d in range(5) for i in range(120)} - held)
    assert gone[:120] == list(range(120)) and len(gone) > 230 and gone[-1] < 2_000_000
    assert records(tmp_path / "run")[-1]["published"] == "delta"
    applied(tmp_path, tmp_path / "served")
    same_model(tmp_path / "served", newest(tmp_path / "run"))


INCCTR = ["trainer.distil.kind=self", "optimizer.sparse.old_rows_factor=0.5", "daily.replay_rows=100"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], INCCTR], ids=["plain", "incctr"])
def test_one_rank_and_two_lead_the_same_life(whole, ranks, tmp_path, more):
    options = ["daily.full_every=3", "daily.epochs=2", "model.dropout=0", *more]
    for world in (1, 2):
        retrained(ranks, whole / "data", tmp_path / str(world), *options, f"daily.to={key_of(2)}", world=world)
    one, two = (without_gauges(records(tmp_path / world)) for world in ("1", "2"))
    for mine, other in zip(one, two, strict=True):
        assert {k: mine[k] for k in ("partition", "rows", "positives", "step", "published", "tables")} == {
            k: other[k] for k in ("partition", "rows", "positives", "step", "published", "tables")
        }
        assert mine["logloss"] == pytest.approx(other["logloss"], rel=1e-4)


@pytest.mark.slow
def test_what_the_calendar_refuses_stops_before_anything_is_published(ranks, tmp_path):
    data, run = write_days(tmp_path / "data", 4, ROWS), tmp_path / "run"
    shutil.move(data / "day=2026-01-02", tmp_path / "aside")
    said = retrained(ranks, data, run, status=2)
    assert said.splitlines()[-1].startswith("error: 2026-01-02 is missing: found 2026-01-03")
    assert not (run / "days.jsonl").exists() and not list((run / "published").iterdir())
    said = retrained(ranks, data, run, "daily.skip=[2026-01-02]", f"daily.to={key_of(2)}")
    assert [(line["status"], line["reason"]) for line in records(run)] == [
        ("trained", None), ("skipped", "missing, daily.skip"), ("trained", None)
    ]  # fmt: skip
    before = served(run), records(run)
    shutil.move(tmp_path / "aside", data / "day=2026-01-02")  # passed over for good
    write_day(data, 2, ROWS, seed=1)
    said = retrained(ranks, data, run, status=2)
    assert "day=2026-01-03 has changed since it was trained: fingerprint" in said.splitlines()[-1]
    write_day(data, 2, ROWS)
    shutil.copytree(data / "day=2026-01-03", data / "day=2026-01-05")
    said = retrained(ranks, data, run, status=2)
    assert "day=2026-01-05 repeats 2026-01-03" in said.splitlines()[-1]
    shutil.rmtree(data / "day=2026-01-05")
    part = data / "day=2026-01-04" / "part-1.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 60] = bytes(60)  # a page inside; footers are whole
    part.write_bytes(content)
    said = retrained(ranks, data, run, world=1, status=2)
    assert "part-1.parquet" in said.splitlines()[-1] and "cannot be decoded" in said.splitlines()[-1]
    shutil.copytree(data / "day=2026-01-01", data / "day=2025-12-31")
    write_day(data, 3, ROWS)
    said = retrained(ranks, data, run, status=2)
    assert "day=2025-12-31 is late: 2026-01-03 is done, and 2025-12-31 never was" in said.splitlines()[-1]
    assert before == (served(run), records(run))
    retrained(ranks, data, run, f"daily.from={key_of(0)}")
    assert [line["status"] for line in records(run)] == ["trained", "skipped", "trained", "trained"]


def test_a_poisoned_day_is_held_and_can_be_accepted_or_passed_over(ranks, tmp_path):
    data, run = write_days(tmp_path / "data", 6, 600), tmp_path / "run"
    write_day(data, 4, 600, flipped=0.3)
    said = retrained(ranks, data, run, *GUARDED, world=2, status=3)
    assert "2026-01-05 is held, not trained and not published: auc is 0." in said
    *good, held = records(run)
    assert [line["status"] for line in good] == ["trained"] * 4
    assert held["status"] == "held" and held["reason"].startswith("auc is 0.") and "expected at least" in held["reason"]
    assert held["published"] is None and held["train_seconds"] is None and held["rows"] == 600
    assert served(run)["chain"][-1] == key_of(3)
    state = tensors_of_state(newest(run))
    assert retrained(ranks, data, run, *GUARDED, status=3)  # again: held again, and nothing has moved
    assert tensors_of_state(newest(run)) == state and served(run)["chain"][-1] == key_of(3)
    accepted, skipped = tmp_path / "accepted", tmp_path / "skipped"
    for folder in (accepted, skipped):
        shutil.copytree(run, folder)
    retrained(ranks, data, accepted, *GUARDED, "daily.accept=[2026-01-05]")
    lines = records(accepted)
    assert lines[4]["status"] == "trained" and lines[4]["reason"].startswith("accepted although auc is")
    assert [line["status"] for line in lines] == ["trained"] * 6 and served(accepted)["chain"][-1] == key_of(5)
    retrained(ranks, data, skipped, *GUARDED, "daily.skip=[2026-01-05]", f"daily.to={key_of(4)}")
    retrained(ranks, data, skipped, *GUARDED)  # for good: it is not named any more
    assert [line["status"] for line in records(skipped)] == ["trained"] * 4 + ["skipped", "trained"]
    assert records(skipped)[5]["auc"] > records(accepted)[5]["auc"] - 0.05


def test_roll_back_and_go_on(whole, ranks, tmp_path):
    run, options = tmp_path / "run", ["daily.full_every=3", "daily.epochs=2"]
    shutil.copytree(whole / "run", run)
    said = retrained(ranks, whole / "data", run, *options, "daily.rollback_to=2026-01-02", world=2)
    assert "is at the end of 2026-01-02 again, step-000000000024" in said
    assert [line["partition"] for line in records(run)] == [key_of(0), key_of(1)]
    assert served(run)["chain"] == [key_of(0), key_of(1)] and served(run)["step"] == 24
    assert newest(run).name == "step-000000000024"
    assert sorted(path.name for path in (run / "days").iterdir()) == [key_of(0), key_of(1)]
    (line,) = [json.loads(line) for line in (run / "rollbacks.jsonl").read_text().splitlines()]
    assert (line["to"], line["from_state"]) == ("2026-01-02", "step-000000000060")
    said = retrained(ranks, whole / "data", run, *options, "daily.rollback_to=2026-01-05", world=2, status=2)
    assert "has no state of the end of that day, it has those of 2026-01-02, 2026-01-01" in said.splitlines()[-1]
    retrained(ranks, whole / "data", run, *options, world=2)
    assert_same_life(run, whole / "run")


def test_watching_for_days_to_come(ranks, tmp_path):
    data, run = write_days(tmp_path / "data", 2, 120), tmp_path / "run"
    (data / "day=2026-01-01" / "_SUCCESS").touch()
    output, watch = tmp_path / "output", ["daily.watch=true", "daily.poll_seconds=0.2"]
    ranks.start(2, command(data, run, *watch, f"daily.to={key_of(2)}"), output)
    _until(lambda: (run / "days.jsonl").exists() and "waiting for the next partition" in output.read_text())
    write_day(data, 2, 120)
    (data / "day=2026-01-03" / "_SUCCESS").touch()
    time.sleep(0.5)
    assert len(records(run)) == 1  # day 2 has no marker yet, and day 3 waits for it
    (data / "day=2026-01-02" / "_SUCCESS").touch()
    assert ranks.wait() == [0, 0], output.read_text()
    assert len(records(run)) == 3 and "all 3 partitions up to 2026-01-03 are done" in output.read_text()
    said = retrained(ranks, data, tmp_path / "none", *watch, "daily.from=2026-02-01", "daily.wait_seconds=0.5")
    assert "no partition behind nothing has come with its _SUCCESS within 0.5 seconds" in said
    said = retrained(ranks, data, run, *watch, "daily.wait_seconds=0.5", world=2)
    assert "no partition behind 2026-01-03 has come with its _SUCCESS within 0.5 seconds (daily.wait_seconds)" in said


def _until(true, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_window_and_stale(whole, ranks, tmp_path):
    """Retraining from nothing on the last two days is a new run over these; a stale model is scored and not touched."""
    two_days = tmp_path / "two"
    for day in (2, 3):
        shutil.copytree(whole / "data" / f"day={key_of(day)}", two_days / f"day={key_of(day)}")
    upto = f"daily.to={key_of(3)}"
    retrained(ranks, whole / "data", tmp_path / "window", "daily.method=window", "daily.window_days=2", upto)
    lines = records(tmp_path / "window")
    assert [line["step"] for line in lines] == [6, 18, 30, 42] and {line["published"] for line in lines} == {"full"}
    trained = times_trained(newest(tmp_path / "window"), 4, ROWS)
    assert trained == [[0] * ROWS, [0] * ROWS, [1] * ROWS, [1] * ROWS]
    retrained(ranks, whole / "data", tmp_path / "stale", "daily.method=stale", "daily.stale_after=2", upto)
    lines = records(tmp_path / "stale")
    assert [line["status"] for line in lines] == ["trained", "trained", "skipped", "skipped"]
    assert [line["step"] for line in lines] == [6, 12, 12, 12] and lines[3]["auc"] > 0.5
    assert served(tmp_path / "stale")["chain"] == [key_of(0), key_of(1)]
    said = retrained(ranks, whole / "data", tmp_path / "stale", "daily.method=stale", "daily.stale_after=2", upto)
    assert "nothing to do" in said and records(tmp_path / "stale") == lines


def test_reports_and_mistakes(ranks, tmp_path):
    data, run = write_days(tmp_path / "data", 2, 120), tmp_path / "run"
    retrained(ranks, data, run, "daily.report=true", "trainer.log_every=1")
    for day in range(2):
        report = json.loads((run / "days" / key_of(day) / "report.json").read_text())
        assert report["rows"] == 120 and report["auc"] == pytest.approx(records(run)[day]["auc"])
        assert (run / "days" / key_of(day) / "report.html").stat().st_size > 10_000
    for more, problem in {
        "daily.from=2026-01-08": "2026-01-08 to any day",
        "daily.to=2026-01-04": "found no partition day=YYYY-MM-DD behind 2026-01-02; expected some up to 2026-01-04",
        "daily.skip=[monday]": "daily.skip is 'monday'; expected a day as 2026-01-31 or an hour as 2026-01-31T05",
    }.items():
        where = run if "from" not in more else tmp_path / "other"
        assert problem in retrained(ranks, data, where, more, status=2).splitlines()[-1]
    said = retrained(ranks, data, run, "trainer.run_dir=null", status=2)
    assert "trainer.run_dir is null; a run over days needs a folder" in said
