"""The benchmarks of exports and servers run to their end, small."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.ranks import PYTHONPATH

needs_a_server = pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="the extra serve is missing")


def figures(name: str, *options: str) -> dict[str, list[str]]:
    """Return the lines of a benchmark's table by their first cell."""
    command = [sys.executable, "-m", f"tessera.scripts.bench.{name}", "--rows", "1000", *options]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in lines}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exports():
    found = figures("export", "--serve-seconds", "0")
    assert float(found["golden rows from evaluation"][0]) <= 1e-6
    for name in ("score, parquet to parquet", "evaluate on the same file"):
        assert float(found[name][0].split()[0].replace(",", "")) > 0
    assert found["export of 1,000 rows"][0].endswith(" s") and found["its bytes"][0].endswith(" MB")
    assert sum(name.startswith("opening the tables") for name in found) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_a_server
def test_a_server_that_follows():
    found = figures("serve", "--seconds", "0.5", "--deltas", "1", "--clients", "1")
    assert found["of these failed"] == ["0", "0"] and found["answers of two models"][1].startswith("0 of ")
    assert all(int(one.replace(",", "")) > 0 for one in found["requests"])
