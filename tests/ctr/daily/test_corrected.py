"""An error memory beside progressive evaluation, and exports that are checked day by day, in whole runs over days."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tessera.ctr.config import load_config
from tessera.ctr.serving.error_memory import FILE, ErrorMemory
from tests.ctr.daily.days import command, key_of, records, served, write_days
from tests.ctr.train.warm_ranks import WarmRanks

DAYS, ROWS = 3, 300
MEMORY = ("daily.memory.enabled=true", "daily.memory.delay_seconds=60", "daily.memory.bits=2", "daily.memory.arrays=4")


@pytest.fixture(scope="module")
def ranks():
    server = WarmRanks("daily")
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_days(tmp_path_factory.mktemp("data"), DAYS, ROWS)


def retrained(ranks: WarmRanks, data: Path, run_dir: Path, *more: str, world: int = 1, status: int = 0) -> str:
    output = run_dir.parent / f"output-{run_dir.name}"
    assert ranks.run(world, command(data, run_dir, *more), output) == [status] * world, output.read_text()
    return output.read_text()


def corrected(run_dir: Path) -> list[dict]:
    return [json.loads((run_dir / "days" / key_of(day) / "corrected.json").read_text()) for day in range(DAYS)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_days_are_corrected_by_labels_of_the_day_alone_on_any_number_of_ranks(ranks, data, tmp_path):
    said = retrained(ranks, data, tmp_path / "one", *MEMORY, "daily.memory.strength=0.9", "export.published=true")
    found = corrected(tmp_path / "one")
    assert [one["rows_before"] for one in found] == [0] * DAYS, "each day's model is another one"
    assert [one["rows_behind"] for one in found] == [ROWS] * DAYS
    for one, record in zip(found, records(tmp_path / "one"), strict=True):
        assert one["auc"] == pytest.approx(record["auc"], abs=1e-9) and one["rows"] == ROWS
        assert one["corrected_logloss"] != one["logloss"] and sum(hour["rows"] for hour in one["hours"]) == ROWS
        assert f"{record['partition']} · error memory · auc {one['auc']:.5f}, corrected" in said
    assert {path.name for path in (tmp_path / "one" / "days" / key_of(0) / "memory").iterdir()} == {FILE}
    for day in range(DAYS):
        export = json.loads((tmp_path / "one" / "days" / key_of(day) / "export.json").read_text())
        assert export["problem"] is None and export["difference"] <= 1e-6
    retrained(ranks, data, tmp_path / "two", *MEMORY, "daily.memory.strength=0.9", "export.published=true", world=2)
    for one, two in zip(found, corrected(tmp_path / "two"), strict=True):
        for name in ("rows", "rows_behind", "auc", "logloss", "corrected_auc", "corrected_logloss"):
            assert one[name] == pytest.approx(two[name], abs=1e-3), name
    retrained(ranks, data, tmp_path / "off", *MEMORY, "daily.memory.strength=0.0")
    for one in corrected(tmp_path / "off"):
        assert (one["corrected_auc"], one["corrected_logloss"]) == (one["auc"], one["logloss"])
    retrained(ranks, data, tmp_path / "without")
    assert served(tmp_path / "one")["step"] == served(tmp_path / "without")["step"]
    for day in range(DAYS):
        names = [tmp_path / run / "published" / key_of(day) / "manifest.json" for run in ("one", "without")]
        files = [
            {k: v for k, v in json.loads(one.read_text())["files"].items() if k.startswith("dense")} for one in names
        ]
        assert files[0] == files[1], "neither the memory nor the check changes what is trained"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_that_stays_keeps_its_memory(ranks, data, tmp_path):
    retrained(ranks, data, tmp_path / "run", *MEMORY, "daily.method=stale", "daily.stale_after=1", "daily.keep_days=1")
    assert [one["rows_before"] for one in corrected(tmp_path / "run")] == [0, 0, ROWS]
    last = tmp_path / "run" / "days" / key_of(2) / "memory"
    assert ErrorMemory.load(last).rows == 2 * ROWS and np.isfinite(ErrorMemory.load(last).bytes)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("trainer.compile=true",), "daily.memory.enabled is true; expected trainer.compile false"),
        (
            ("data.schema.time=null", "embedding.ttl_days=null"),
            "daily.memory.enabled is true; expected data.schema.time",
        ),
    ],
)
def test_what_has_no_memory_says_so_before_it_begins(ranks, data, tmp_path, more, line):
    kept = [one for one in MEMORY if "enabled" in one]
    assert line in retrained(ranks, data, tmp_path / "run", *kept, *more, status=2)


def test_the_keys_are_checked():
    with pytest.raises(Exception, match="daily.memory.gamma is 1.5; expected at least 0 and at most 1"):
        load_config(["daily.memory.gamma=1.5"], "")
