"""What a run removes from `published/`: publications that it made and that nobody needs, and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest

from tessera.ctr.daily.latest import read_latest
from tessera.ctr.daily.publish import point
from tests.ctr.daily.publications import published
from tests.ctr.test_output_folders import tree


@pytest.fixture
def days(tmp_path):
    """Five days: full, delta, full, delta, full. With one day kept only the last is needed."""
    return published(tmp_path / "published", "full", "delta", "full", "delta", "full")


def test_old_publications_go_and_what_newer_ones_build_on_stays(days, tmp_path):
    point(days.root, days.records, keep_days=2)
    assert days.root.names() == ["2026-01-03", "2026-01-04", "2026-01-05", "latest"]
    point(days.root, days.records, keep_days=1)
    assert days.root.names() == ["2026-01-05", "latest"]


def test_what_others_put_there_is_left_alone(days, tmp_path):
    root, warned = tmp_path / "published", []
    (root / "README.md").write_text("mine")
    (root / "backup").mkdir()
    (root / "backup" / "model").write_text("mine")
    (root / "2025-12-31").mkdir()  # called as a day
    (root / "2025-12-31" / "thesis").write_text("mine")
    (root / "2025-12-30").write_text("a file")
    shutil.copytree(root / "2026-01-03", root / "2025-12-29")  # a copy under another name
    (root / "2026-01-01" / "notes").write_text("mine")  # inside of one that is not needed
    (root / "2026-01-02" / "manifest.json").write_bytes(b"torn")  # damaged, and the records know it
    before = tree(root)
    point(days.root, days.records, 1, warned.append)
    after = tree(root)
    gone = {name.partition("/")[0] for name in before.keys() - after.keys()}
    assert gone == {"2026-01-02", "2026-01-03", "2026-01-04"}
    assert {name: before[name] for name in after} == after
    reasons = {line.partition(" is not needed")[0].rpartition("/")[2]: line.partition("because ")[2] for line in warned}
    assert reasons == {
        "2025-12-29": "no run has published it",
        "2025-12-30": "no run has published it",
        "2025-12-31": "it holds thesis, which no run has published",
        "2026-01-01": "it holds notes, which no run has published",
    }


def test_after_a_rollback_records_do_not_know_the_newer_days_and_they_still_go(days, tmp_path):
    (tmp_path / "published" / "2026-01-05" / "notes").write_text("mine")
    point(days.root, days.records[:4], keep_days=2)
    assert days.root.names() == ["2026-01-03", "2026-01-04", "2026-01-05", "latest"]
    (tmp_path / "published" / "2026-01-05" / "notes").unlink()
    point(days.root, days.records[:4], keep_days=1)
    assert days.root.names() == ["2026-01-03", "2026-01-04", "latest"]
    assert read_latest(days.root)["partition"] == "2026-01-04"


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b""])
def test_a_damaged_latest_is_written_anew(days, tmp_path, content):
    latest = tmp_path / "published" / "latest"
    whole = latest.read_bytes()
    latest.write_bytes(content)
    point(days.root, days.records, keep_days=5)
    assert latest.read_bytes() == whole and json.loads(whole)["partition"] == "2026-01-05"


def test_an_object_store_is_kept_in_the_same_way(store):
    days = published(store.uri("published"), "full", "delta", "full")
    store.put("published/2025-12-31/thesis", b"mine")
    store.put("published/README.md", b"mine")
    point(days.root, days.records, keep_days=1)
    assert {name.split("/")[1] for name in store.objects()} == {"2025-12-31", "2026-01-03", "README.md", "latest"}
