"""The benchmark of DeepFM on a GPU: its step is a training step, and it runs, and says so, where there is no GPU."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tessera.scripts.bench.gpu_deepfm import CPU_SHAPE, PARTS, Clock, Model, drawn_batch
from tessera.scripts.bench.gpu_tables import spread
from tests.ranks import ROOT

# On a machine that has a GPU and nothing but torch and Triton.
BARE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchrec", "fbgemm_gpu", "hydra", "omegaconf", "pyarrow", "fsspec"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv = ["gpu_deepfm.py", "--repeat", "3"]
runpy.run_path("scripts/bench/gpu_deepfm.py", run_name="__main__")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures one")
@pytest.mark.slow
def test_without_a_gpu_it_measures_a_tiny_size_and_says_so():
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    where, what, heading, *lines = done.stdout.splitlines()
    assert where.startswith("no GPU at hand, this is the CPU and a tiny size") and "the figures mean nothing" in where
    assert "3 tables of 200 rows" in what and all(part in heading for part in PARTS)
    assert [line.split()[0] for line in lines] == ["fp32", "amp"]
    for line in lines:
        assert 95 <= sum(map(int, re.findall(r"(\d+)%", line))) <= 105


def test_a_step_is_that_of_plain_torch():
    device, shape = torch.device("cpu"), CPU_SHAPE
    model = Model(shape, device, "sgd")
    ids = spread(torch.arange(shape.rows))
    rows = [table.gather(table.lookup(ids, 0, training=False)).requires_grad_() for table in model.tables]
    tower = copy.deepcopy(model.tower)
    dense = torch.optim.Adam(tower.parameters(), lr=0.001)
    for seed in range(4):
        batch = drawn_batch(shape, seed, device)
        found = [row[one.unsqueeze(1).eq(ids).int().argmax(1)] for row, one in zip(rows, batch.ids, strict=True)]
        v_bfd, w_bf1 = torch.stack(found, 1).split([shape.dim, 1], 2)
        loss = F.binary_cross_entropy_with_logits(tower(batch.numeric, {"v": v_bfd, "w": w_bf1}), batch.label)
        dense.zero_grad()
        loss.backward()
        dense.step()
        with torch.no_grad():
            for row in rows:
                row -= 0.01 * row.grad
                row.grad = None
        torch.testing.assert_close(model.step(batch, Clock(device)), loss.detach())
    for table, row in zip(model.tables, rows, strict=True):
        torch.testing.assert_close(table.gather(table.lookup(ids, 0, training=False)), row.detach())
    torch.testing.assert_close(model.tower.state_dict(), tower.state_dict(), rtol=1e-4, atol=1e-5)
