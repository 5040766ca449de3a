"""Traces of given steps, in the run folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.config_types import ProfileConfig
from tessera.ctr.train.profiling import StepProfiler
from tessera.embedding.errors import ConfigError
from tests.ctr.train.test_dense_optimizer import optimizers_of, steps
from tests.distributed.saved_tables import alone


def updates_in(trace: Path) -> int:
    """How many updates of the dense optimizer a trace has."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "Optimizer.step#Adam.step" and event["ph"] == "X" for event in events)


@pytest.mark.parametrize(
    ("begins", "ends", "name", "count"),
    [
        (0, 6, "steps-2-4", 3),
        (2, 6, "steps-3-4", 2),
        (0, 3, "steps-2-3", 2),
    ],
    ids=["whole", "goes on among them", "ends among them"],
)
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, begins, ends, name, count):
    optimizers, named = optimizers_of()
    profiler = StepProfiler(ProfileConfig(start=2, steps=3), tmp_path, alone())
    profiler.at(begins)
    for step in range(begins, ends):
        steps(optimizers, named, step, step + 1)
        profiler.at(step + 1)
    profiler.close(ends)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == f"{name}-rank-0.json.gz" and updates_in(trace) == count


def test_a_number_of_steps_without_a_first_one_is_one_line():
    with pytest.raises(ConfigError, match=r"trainer.profile.steps is 9, which needs trainer.profile.start"):
        load_config(["trainer.profile.steps=9"], "")


@pytest.mark.slow
def test_a_run_writes_it(process, tmp_path):
    from tessera.ctr.train.trainer import Trainer
    from tests.ctr.train.states import arguments, write_data

    data = write_data(tmp_path / "data", 100, valid=20)
    keys = ["trainer.batch_size=20", "trainer.profile.start=2", "trainer.profile.steps=2"]
    Trainer(load_config(arguments(data, tmp_path / "run", *keys), ""), process).fit()
    assert updates_in(tmp_path / "run" / "profile" / "steps-2-3-rank-0.json.gz") == 2
