"""New items by semantic ids: a small form of scripts/bench/semantic_ids.py."""

from __future__ import annotations

import re

import pytest

from tests.ranks import run_script


@pytest.mark.slow
def test_new_items_come_near_the_ceiling_by_prefixes_and_old_ones_lose_nothing():
    options = ["--seeds", "1", "--rows", "60000", "--items", "2000"]
    done = run_script("scripts/bench/semantic_ids.py", *options)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(item id|prefixes|both|ceiling) +(\d\.\d+) ± \S+ +(\d\.\d+)", done.stdout, re.MULTILINE)
    old, new = ({name: float(row[column]) for name, *row in rows} for column in (0, 1))
    assert abs(new["item id"] - 0.5) < 0.02, "an id that was never trained says nothing"
    for name in ("prefixes", "both"):
        assert new["ceiling"] - 0.08 < new[name] <= new["ceiling"] + 0.01, (name, new)
        assert old[name] > old["item id"] - 0.002, (name, old)
