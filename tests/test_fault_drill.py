"""A few runs of the drill; `python -m tests.fault_drill` does two hundred."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.drill.damage import FAULTS, Damage
from tests.ranks import ROOT


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "file" in fault or "bit" in fault])
def test_damage_changes_one_file_and_is_undone(tmp_path, fault):
    files = [tmp_path / name for name in ("a", "b")]
    for path in files:
        path.write_bytes(bytes(range(100)))

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    before = content()
    for seed in range(20):
        damage = Damage.do(fault, files, random.Random(seed))
        assert len(set(content().items()) ^ set(before.items())) in (1, 2)
        damage.undo()
        assert content() == before


@pytest.mark.slow
def test_four_runs_of_the_drill():
    command = [sys.executable, "-m", "tests.fault_drill", "--runs", "4", "--seed", "11"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 runs, 0 failed" in done.stdout
