"""An export of what a day has published scores as the live model does, or `latest` does not name it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tessera.ctr.daily.rollback import _check_published
from tessera.ctr.data.schema import Schema
from tessera.ctr.export.published import RESULT, PublishedCheck, problem_of
from tessera.ctr.serving import ExportError
from tessera.distributed.saved.manifest import CheckpointError, read_manifest
from tests.ctr.export.test_versions import Days
from tests.distributed.saved_tables import alone


@pytest.fixture(scope="module")
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield alone()
    dist.destroy_process_group()


class Checked(Days):
    """Days whose publications are checked, as the day loop does."""

    def check(self) -> Path:
        name = self.records[-1].partition
        folder = self.folder / "run" / "days" / name
        checked = PublishedCheck(self.config, Schema(self.config.data.schema), self.model, self.process)
        checked.check(self.publisher.root.below(name).name, name, folder, [str(self.folder / "data")])
        return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("embedding.oov=learned", "embedding.tables={c: {dim: 2}}", "embedding.formats={d.v: int8}"),
        ("embedding=static",),
        ("optimizer.sparse.decay=0.5", "optimizer.sparse.decay_count_power=0.5"),
    ],
)
def test_publications_of_both_kinds_are_scored_as_evaluation_does_and_others_are_told(process, tmp_path, more):
    days = Checked(process, tmp_path, *more)
    days.publish("full")
    days.check()
    days.publish("full" if "static" in more[0] else "delta")
    was_training = days.model.training
    folder = days.check()
    assert days.model.training == was_training
    found = json.loads((folder / RESULT).read_text())
    assert found["problem"] is None and found["difference"] <= 1e-6 and found["rows"] > 64
    checksum = read_manifest(days.publisher.root.below("2026-01-02"))["checksum"]
    assert problem_of(folder, checksum) is None
    with torch.no_grad():
        next(days.model.module.tower.parameters()).add_(0.5)
    line = (
        "the export of 2026-01-02 scores golden row [0-9]+ as .*, evaluation as .*: .* apart, expected at most 1e-06; "
        "latest does not name it. daily.rollback_to goes back to a day before"
    )
    with pytest.raises(ExportError, match=line) as error:
        days.check()
    assert "\n" not in str(error.value)
    assert problem_of(folder, checksum) and problem_of(folder, "of another") is None
    with pytest.raises(
        CheckpointError, match="daily.rollback_to: the export of 2026-01-02 scores .*; choose a day before"
    ):
        _check_published(days.publisher.root, days.records, tmp_path / "run")
    _check_published(days.publisher.root, days.records[:1], tmp_path / "run")


def test_what_is_wrong_with_an_export_is_told_of_its_publication_alone(tmp_path):
    assert problem_of(tmp_path, "one") is None, "nobody has looked"
    (tmp_path / RESULT).write_text(json.dumps({"publication": "one", "problem": "golden row 3 differs"}))
    assert problem_of(tmp_path, "one") == "golden row 3 differs" and problem_of(tmp_path, "two") is None
    (tmp_path / RESULT).write_text(json.dumps({"publication": "one", "problem": None}))
    assert problem_of(tmp_path, "one") is None
    (tmp_path / RESULT).write_text('{"publication": "one", "prob')
    assert problem_of(tmp_path, "one") is None, "it was killed while it wrote"
