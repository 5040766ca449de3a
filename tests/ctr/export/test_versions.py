"""An export that follows a run over days scores as the live model did on each day, whatever happened on the way."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from tessera.ctr.config import Config
from tessera.ctr.daily.day_record import DayRecord, Stage
from tessera.ctr.daily.publish import Publisher, point
from tessera.ctr.data.schema import Schema
from tessera.ctr.export.golden import scores_of
from tessera.ctr.network import build_model
from tessera.ctr.serving import ExportError, Scorer
from tessera.ctr.serving.versions import Versions
from tessera.distributed.tables import as_dynamic, owned_tables
from tests.ctr.export.models import awkward_rows, damaged, export, make_run, overrides_of, touch
from tests.ctr.export.test_parity import digest
from tests.distributed.saved_tables import alone
from tests.ranks import PYTHONPATH

ROWS = awkward_rows(60, seed=77)
LIFE = ("embedding.ttl_days=2", "embedding.clock=wall")


@pytest.fixture(scope="module")
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield alone()
    dist.destroy_process_group()


class Days:
    """A model that changes from day to day, published as a run over days does."""

    def __init__(self, process, folder: Path, *overrides: str, model: str = "deepfm") -> None:
        self.process, self.folder = process, folder
        self.config: Config = make_run(
            process,
            folder,
            overrides_of(folder, *overrides, model=model),
        )
        self.model, _ = build_model(self.config, Schema(self.config.data.schema), process)
        self.publisher = Publisher(folder / "run", self.config, self.model.module, process)
        self.records: list[DayRecord] = []
        self.scores: list[np.ndarray] = []
        self._last: Versions | None = None

    def publish(self, kind: str) -> None:
        number = len(self.records) + 1
        path = self.folder / "day.parquet"
        pq.write_table(awkward_rows(40, seed=number), path)
        touch(self.process, self.config, self.model, path, seed=number, now=86400 * number)
        if dynamic := as_dynamic(self.model.module.tables):
            dynamic.expire(86400 * number, everywhere=True)
        for table in owned_tables(self.model.module.tables).values():
            table.decayed -= 0.2  # a day's, where rows decay
        self.scores.append(scores_of(self.model, self.config, ROWS))
        self.records.append(DayRecord(f"2026-01-{number:02d}", None, Stage.TRAINED, published=kind, step=number))
        self.publisher.publish(self.records)
        self.point()

    def point(self) -> None:
        point(self.publisher.root, self.records, keep_days=20)

    def versions(self) -> Versions:
        """A server's, which has ended when the next one is made."""
        if self._last is not None:
            self._last.close()
        self._last = Versions(self.folder / "export", f"{self.folder}/run/published", self.folder / "versions")
        return self._last


@pytest.mark.parametrize("changes", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_changes_give_the_scores_of_each_day_and_the_tables_of_an_export_made_anew(process, tmp_path, changes):
    days = Days(process, tmp_path, "embedding.oov=learned", "embedding.format=bf16", *LIFE, model="fm")
    days.publish("full")
    assert export(process, tmp_path).name == "2026-01-01"
    versions = days.versions()
    scorer = versions.begin()
    assert versions.update(scorer) is None
    bases = {scorer.base}
    for _ in range(changes):
        days.publish("delta")
        before, scorer = scorer, versions.update(scorer)
        assert scorer is not None and versions.update(scorer) is None
        assert scorer.base not in bases  # an error memory of the day before is forgotten
        bases.add(scorer.base)
        assert scorer.folders == [tmp_path / "export", *sorted((tmp_path / "versions").glob("*.changes"))]
        np.testing.assert_allclose(scorer(ROWS), days.scores[-1], rtol=0, atol=1e-6)
        np.testing.assert_allclose(before(ROWS), days.scores[-2], rtol=0, atol=1e-6)
    assert np.abs(days.scores[-1] - days.scores[0]).max() > 0.01  # or nothing has been shown
    export(process, tmp_path, "anew")
    anew = Scorer.load(tmp_path / "anew")
    assert scorer(ROWS).tolist() == anew(ROWS).tolist() and scorer.base == anew.base
    again = days.versions().begin()  # a server that starts now
    assert again.version == scorer.version and again(ROWS).tolist() == scorer(ROWS).tolist()
    merged_is_an_export_made_anew(days._last, again, tmp_path)
    went_back_and_on_again(days, days.versions(), scorer)


def merged_is_an_export_made_anew(versions: Versions, scorer: Scorer, folder: Path) -> None:
    versions.merge(scorer)
    whole = versions.update(scorer)
    assert whole is not None and whole.version == scorer.version and versions.update(whole) is None
    assert len(whole.folders) == 1 and whole.changed == 0 < scorer.changed
    assert digest(whole.folder) == digest(folder / "anew") != digest(folder / "export")
    assert Scorer.load(whole.folder, check=True)(ROWS).tolist() == scorer(ROWS).tolist()


def went_back_and_on_again(days: Days, versions: Versions, scorer: Scorer) -> None:
    days.records = days.records[:-1]
    days.point()
    back = versions.update(scorer)
    assert back is not None and back.version.startswith(days.records[-1].partition)
    np.testing.assert_allclose(back(ROWS), days.scores[len(days.records) - 1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scorer(ROWS), days.scores[-1], rtol=0, atol=1e-6)  # an answer that was begun before
    assert days.versions().begin().version == back.version  # a server that starts now
    days.publisher.forget()
    days.publish("full")
    whole = versions.update(back)
    assert whole is not None
    np.testing.assert_allclose(whole(ROWS), days.scores[-1], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_rows_that_no_change_holds_decay_with_each(process, tmp_path):
    decay = ("optimizer.sparse.decay=0.5", "optimizer.sparse.decay_count_power=0.5", "embedding.formats={v: int8}")
    days = Days(process, tmp_path, *decay, model="fm")
    days.publish("full")
    export(process, tmp_path)
    versions = days.versions()
    scorer = versions.begin()
    for _ in range(3):
        days.publish("delta")
        scorer = versions.update(scorer)
        assert scorer is not None
        np.testing.assert_allclose(scorer(ROWS), days.scores[-1], rtol=0, atol=1e-6)
    export(process, tmp_path, "anew")
    assert scorer(ROWS).tolist() == Scorer.load(tmp_path / "anew")(ROWS).tolist()
    tables = [scorer.table(one.name).table for one in scorer.description.tables]
    assert all(table.decay_floats == 2 and table.decayed == pytest.approx(-0.8) for table in tables)
    merged_is_an_export_made_anew(versions, scorer, tmp_path)


@pytest.mark.slow
def test_static_tables_and_other_formats_are_followed_too(process, tmp_path):
    days = Days(process, tmp_path, "embedding=static", "model.embedding_dim=16")
    days.publish("full")
    export(process, tmp_path, format="int8")
    versions = days.versions()
    scorer = versions.begin()
    days.publish("full")
    scorer = versions.update(scorer)
    assert scorer is not None and {group.format for t in scorer.description.tables for group in t.groups} == {
        "int8",
        "fp32",
    }
    np.testing.assert_allclose(scorer(ROWS), days.scores[-1], rtol=0, atol=2e-2)


@pytest.fixture(scope="module")
def first_two(process, tmp_path_factory) -> Days:
    days = Days(process, tmp_path_factory.mktemp("days"), model="lr")
    days.publish("full")
    export(process, days.folder)
    days.publish("delta")
    return days


@pytest.fixture
def two_days(first_two, tmp_path) -> Days:
    """An export of the first of two days, in a folder of the test."""
    days = copy.copy(first_two)
    days.folder = tmp_path / "days"
    shutil.copytree(first_two.folder, days.folder)
    return days


def test_what_is_damaged_or_of_another_model_is_refused_and_leaves_what_is_served(two_days):
    versions = two_days.versions()
    scorer = versions.begin()
    published = two_days.folder / "run" / "published"
    rows = next((published / "2026-01-02" / "rows").glob("*/*.parquet"))
    content = rows.read_bytes()
    wrong = content[:-1] + bytes([content[-1] ^ 1])
    with damaged(rows, wrong), pytest.raises(ExportError, match="2026-01-02 is damaged: .* has another checksum"):
        versions.update(scorer)
    for path in (path for path in (published / "2026-01-02").rglob("*") if path.is_file()):
        for part in (b"", path.read_bytes()[:-1], None):  # half copied, by rsync say
            with damaged(path, part), pytest.raises(ExportError):
                versions.update(scorer)
    latest = (published / "latest").read_text()
    (published / "latest").write_text(latest.replace("2026-01-02", "2026-01-03"))
    with pytest.raises(ExportError, match="latest is damaged"):
        versions.update(scorer)
    (published / "latest").write_text(latest)
    manifest = two_days.folder / "export" / "manifest.json"
    said = json.loads(manifest.read_text())
    scorer.manifest["model"] = {**said["model"], "numeric": {}}
    with pytest.raises(ExportError, match="was trained with another model or schema than the export; export the run"):
        versions.update(scorer)
    assert [path.name for path in (two_days.folder / "versions").iterdir()] == [".lock"]
    scorer.manifest["model"] = said["model"]
    assert versions.update(scorer) is not None


def test_half_a_version_is_removed_by_the_next_start(two_days):
    versions = two_days.versions()
    half = two_days.folder / "versions" / ".partial-2026-01-02-abc"
    half.mkdir(parents=True)
    (half / "tower.pt2").write_bytes(b"half")
    scorer = versions.begin()
    assert not half.exists() and scorer.version.startswith("2026-01-01")
    newer = versions.update(scorer)
    assert newer is not None
    table = next(newer.folder.glob("tables/*/rows.npy"))
    table.write_bytes(table.read_bytes()[:-1])
    assert two_days.versions().begin().version == scorer.version  # the damaged one is made again
    again = versions.update(scorer)
    assert again is not None and again.version == newer.version


def test_a_folder_of_versions_is_one_servers_and_of_one_export(process, two_days):
    versions = two_days.versions()
    newer = versions.update(versions.begin())
    assert newer is not None
    other = Versions(two_days.folder / "export", f"{two_days.folder}/run/published", two_days.folder / "versions")
    with pytest.raises(ExportError, match="is in use by another server; expected a folder of its own"):
        other.begin()
    export(process, two_days.folder, "other")  # of what is published now
    versions.close()
    other = Versions(two_days.folder / "other", f"{two_days.folder}/run/published", two_days.folder / "versions")
    scorer = other.begin()
    assert scorer.folder == two_days.folder / "other" and other.update(scorer) is None


def test_a_server_changes_its_model_between_answers(two_days):
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    from tessera.ctr.serving.app import Server, Settings
    from tests.ctr.export.asgi import running

    versions, said = two_days.versions(), []
    first = versions.begin()
    server = Server(first, Settings(versions=versions, poll_seconds=60), say=said.append)
    rows = ROWS.drop_columns(["label", "buy", "price"]).to_pylist()

    async def run() -> None:
        async with running(server.app()) as client:
            replies, versions_seen = [], set()
            for _ in range(200):
                replies = await asyncio.gather(*(client.post("/score", {"rows": rows}) for _ in range(5)))
                for reply in replies:
                    assert reply.status == 200
                    version = reply.json()["version"]
                    versions_seen.add(version)
                    day = 0 if version == first.version else 1
                    np.testing.assert_allclose(reply.json()["scores"], two_days.scores[day], rtol=0, atol=1e-6)
                if len(versions_seen) == 2:
                    break
            assert len(versions_seen) == 2
            assert b'tessera_model_updates_total{result="done"} 1.0' in (await client.send("GET", "/metrics")).body

    asyncio.run(run())
    assert said == [f"serving {two_days.versions().begin().version}"]


def test_applying_changes_costs_what_they_hold(two_days):
    versions = two_days.versions()
    scorer = versions.update(versions.begin())
    published = two_days.folder / "run" / "published" / "2026-01-02" / "rows"
    held = len(pq.read_table(published, columns=["id"], partitioning=None))
    written = sum(len(np.load(path)) for path in scorer.folder.glob("tables/*/rows.npy"))
    assert scorer.changed == written == held < scorer.rows  # and no row of the export, nor an index of it
    assert {path.name for path in scorer.folder.glob("tables/*/*")} == {"rows.npy", "gone.npy"}


@pytest.mark.slow
def test_many_changes_are_merged_beside_the_next_update(process, tmp_path):
    days = Days(process, tmp_path, model="lr")
    days.publish("full")
    export(process, tmp_path)
    versions = days.versions()
    scorer = versions.begin()
    days.publish("delta")
    scorer = versions.update(scorer)
    assert versions.merge_due(scorer) == (scorer.changed > 0.25 * scorer.rows)
    versions._merge_share = 1e-9
    assert versions.merge_due(scorer) and not versions.merge_due(versions.base)
    days.publish("delta")
    newer = versions.update(scorer)
    versions.merge(scorer)
    merged = versions.update(newer)
    assert merged is not None and len(merged.folders) == 2 and merged.version == newer.version
    assert merged(ROWS).tolist() == newer(ROWS).tolist()
    days.publish("delta")
    versions.update(merged)
    left = {path.name[:10] for path in (tmp_path / "versions").iterdir() if path.is_dir()}
    assert left == {"2026-01-02", "2026-01-03", "2026-01-04"}


def test_an_update_that_fails_again_and_again_appends_its_rows_once(two_days, monkeypatch):
    versions = two_days.versions()
    scorer = versions.begin()

    def refuse(other: Scorer) -> None:
        raise ExportError("no")

    with monkeypatch.context() as change:
        change.setattr(versions, "_check", refuse)
        for _ in range(3):
            with pytest.raises(ExportError, match="no"):
                versions.update(scorer)
    newer = versions.update(scorer)
    for table in newer.description.tables:
        changed = newer.table(table.name)
        assert len(changed._rows) == len(np.load(newer.folder / table.folder / "rows.npy"))


def test_changes_alone_are_no_export(two_days):
    versions = two_days.versions()
    newer = versions.update(versions.begin())
    with pytest.raises(ExportError, match="holds changes of an export, which a server lays over it; expected one"):
        Scorer(newer.folder)
    with pytest.raises(ExportError, match="holds no changes that follow 2026-01-02"):
        newer.with_changes(newer.folder)


KILLED = """
import os, signal, sys
from pathlib import Path
import tessera.ctr.serving.versions as versions
folder, moment = Path(sys.argv[1]), int(sys.argv[2])
seen = 0
def kill(event, arguments):
    global seen
    if event in ("open", "os.rename") and ".partial-" in str(arguments[0]):
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)
follower = versions.Versions(folder / "export", str(folder / "run" / "published"), folder / "versions")
scorer = follower.begin()
sys.addaudithook(kill)
newer = follower.update(scorer) or scorer
if len(sys.argv) > 3:
    seen, moment = 0, int(sys.argv[3])
    follower.merge(newer)
"""


def killed(days: Days, *moments: int) -> bool:
    """Run a server's update, and with two moments a merge, and kill it when it opens its n-th file. Returns whether it
    came to the end."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", KILLED, str(days.folder), *map(str, moments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    return done.returncode == 0


def whole_at_the_next_start(days: Days, day: int) -> None:
    versions = days.versions()
    scorer = versions.begin()
    assert scorer.version.startswith(f"2026-01-0{day + 1}")
    np.testing.assert_allclose(scorer(ROWS), days.scores[day], rtol=0, atol=1e-6)
    assert not list((days.folder / "versions").glob(".partial-*"))
    versions.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_while_changes_are_applied_leaves_a_whole_model(two_days):
    for moment in (1, 2, 4, 9, 15):
        assert not killed(two_days, moment)
        whole_at_the_next_start(two_days, 0)
    assert killed(two_days, 1000)
    whole_at_the_next_start(two_days, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_while_changes_are_merged_leaves_a_whole_model(two_days):
    for moment in (1, 3, 9, 20, 35):
        assert not killed(two_days, 1000, moment)
        whole_at_the_next_start(two_days, 1)
    assert killed(two_days, 1000, 1000)
    whole_at_the_next_start(two_days, 1)
