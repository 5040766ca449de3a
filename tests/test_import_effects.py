"""An import changes nothing of the interpreter but what the libraries below Tessera change."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.ranks import PYTHONPATH
from tests.test_imports import LAYERS, modules_of

# torch, torchrec and what else has effects of its own comes first, so that what differs afterwards is ours.
FOREIGN = """
import importlib, json, logging, os, sys, warnings
import torch, torch.distributed.fsdp, torchrec, fbgemm_gpu, hydra, matplotlib.pyplot, pyarrow.dataset, pyarrow.parquet
import fsspec, jinja2, safetensors.torch, sklearn.metrics, tensordict, tensorboard, torch.utils.tensorboard, tqdm

def state():
    loggers = {name: one.level for name, one in logging.root.manager.loggerDict.items() if hasattr(one, "level")}
    return {
        "environment": dict(os.environ),
        "warnings": [repr(one) for one in warnings.filters],
        "levels": {"": logging.root.level, "disabled": logging.root.manager.disable, **loggers},
        "handlers": [repr(one) for one in logging.root.handlers],
        "argv": list(sys.argv),
        "path": list(sys.path),
        "excepthook": repr(sys.excepthook),
        "threads": torch.get_num_threads(),
        "type": str(torch.get_default_dtype()),
    }
"""
OURS = """
before = state()
for name in json.loads(sys.stdin.read()):
    importlib.import_module(name)
after = state()
for name, level in list(after["levels"].items()):  # a library that is imported for the first time makes its own
    if name not in before["levels"] and not name.startswith("tessera"):
        del after["levels"][name]
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps(changed))
"""


#: The last layer imports all others; each alone says whose effect it is.
@pytest.mark.parametrize("layer", [*(pytest.param(one, marks=pytest.mark.slow) for one in LAYERS[:-1]), LAYERS[-1]])
def test_an_import_changes_nothing_of_the_interpreter(layer):
    """Benchmarks are programs, which read their command line as they are loaded."""
    programs = ("tessera.scripts.bench.", "tessera.kernels.triton_ops" if find_spec("triton") is None else "-")
    modules = sorted(name for name in modules_of(layer) if not name.startswith(programs))
    assert len(modules) > 10
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN + OURS],
        input=json.dumps(modules),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


@pytest.mark.parametrize("module", ["ctr", "ctr.api", "scripts.command", "scripts.train", "scripts.daily"])
def test_what_starts_a_process_loads_without_torch(module):
    """So that it can still set what OpenMP reads when torch loads it."""
    check = f"import sys, tessera.{module}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    assert subprocess.run([sys.executable, "-c", check], env=environment, timeout=100).returncode == 0


def test_the_restart_of_a_benchmark_keeps_its_command_line_and_ends():
    program = (
        "import os, sys; import tessera.distributed.threads as threads; threads.restart_with_idle_threads_asleep(); "
        "print(os.environ['OMP_WAIT_POLICY'], sys.argv[1:])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for policy, seen in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", program, "--rounds", "2 3"],
            capture_output=True,
            text=True,
            timeout=100,
            env={**environment, **policy, "PYTHONPATH": PYTHONPATH},
        )
        assert done.stdout == f"{seen} ['--rounds', '2 3']\n", done.stderr
