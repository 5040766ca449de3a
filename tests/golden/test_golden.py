"""Golden results: a change of code that is to leave results alone leaves these alone.

Losses and metrics are compared to 1e-6 of their size, counts of rows exactly. With TESSERA_GOLDEN_BITS=1 every bit
counts, of losses and of the rows and dense tensors that were saved. That is not the default because bits may differ
between types of CPU: libraries choose other instructions there, which add in another order. To see whether a change
keeps every bit, run the commit before it with TESSERA_GOLDEN_BITS=1 on the same machine; if that fails, write the files
again there (tests/golden/update.py), without committing them.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest

from tests.golden.compare import differences
from tests.golden.jobs import JOBS, measure, read, write_all

EXACT = os.environ.get("TESSERA_GOLDEN_BITS") == "1"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_all(folder)
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_results_are_the_golden_ones(data, tmp_path, name):
    found = differences(read(name), measure(name, data, tmp_path), EXACT)
    assert not found, "\n".join([f"{len(found)} results moved:", *found[:20]])


def test_the_jobs_do_what_they_are_here_for():
    """Rows are turned away, expire and are evicted, a state of changes names those; and the run over days learns from
    a teacher on all days but the first."""
    life, daily = read("fgcnn_life_of_rows"), read("daily_incremental")
    assert min(life["counts"][key] for key in ("rejected", "expired", "evicted")) > 0
    assert any("/gone/" in part for part in life["bits"]) and daily["counts"]["expired"] > 0
    of_teacher = [line["loss"] for line in daily["results"] if "epoch" in line]
    assert of_teacher[:2] == [0, 0] and len(of_teacher) >= 6 and min(of_teacher[2:]) > 0
    assert all(len(read(name)["losses"]) >= 15 for name in JOBS)


def test_a_result_that_moved_is_seen():
    golden = read("deepfm_bags")
    cases = {
        "losses[3] is": lambda one: one["losses"].__setitem__(3, one["losses"][3] * (1 + 1e-4)),
        "losses has": lambda one: one["losses"].pop(),
        "results[0].auc is": lambda one: one["results"][0].update(auc=one["results"][0]["auc"] - 1e-5),
        "counts.new is": lambda one: one["counts"].update(new=one["counts"]["new"] + 1),
    }
    for message, move in cases.items():
        moved = copy.deepcopy(golden)
        move(moved)
        (line,) = differences(golden, moved, exact=False)
        assert line.startswith(message)
    other_bits = copy.deepcopy(golden)
    other_bits["losses"][3] *= 1 + 1e-15
    other_bits["bits"][next(iter(golden["bits"]))] = "0"
    assert not differences(golden, other_bits, exact=False)
    assert len(differences(golden, other_bits, exact=True)) == 2
