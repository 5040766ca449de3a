"""Beginning with the next batch while a step is trained, as on a GPU: the run and its states are those without it."""

from __future__ import annotations

import functools
import signal
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.train.trainer import Trainer
from tests.ctr.train.states import arguments, metrics_of, newest, tensors_of_state, without, write_data
from tests.ctr.train.test_cache import BATCH, ROWS, assert_same_states, trained

RATES = ("normalized_entropy", "calibration")
STATIC = ["embedding=static", "embedding.rows=400", "optimizer.sparse.name=rowwise_adagrad"]
#: The last step of the epoch has other sizes on the two ranks.
SETTINGS = {
    "dynamic": ["embedding.ttl_days=2", "embedding.oov=learned", "embedding.init=oov"],
    "static": STATIC,
    "bags and scales": ["embedding.format=int8", "embedding.alpt.every=2", "embedding.pooled_output_dist=always"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", ROWS + 33)


LONG = ["static", "bags and scales"]  # 10 s each


@pytest.mark.parametrize("setting", ["dynamic", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_an_overlapped_run_is_the_run_without(ranks, data, tmp_path, setting):
    """Saved states too, the reader's position in them, and the run that goes on from one that was asked to stop."""
    plain, overlapped, stopped = (tmp_path / name for name in ("plain", "overlapped", "stopped"))
    more = [*SETTINGS[setting], "trainer.eval_every=7"]
    trained(ranks, 2, data, plain, *more)
    trained(ranks, 2, data, overlapped, *more, overlap=True)
    assert metrics_of(overlapped) == metrics_of(plain)
    assert_same_states(overlapped / "checkpoints", plain / "checkpoints")
    assert tensors_of_state(overlapped / "best") == tensors_of_state(plain / "best")
    resume = "trainer.resume=auto"
    end = (7, signal.SIGTERM, [1])
    trained(ranks, 2, data, stopped, *more, resume, overlap=True, status=75, end=end)
    assert newest(stopped).name not in ("step-000000000005", "step-000000000010")
    trained(ranks, 2, data, stopped, *more, resume, overlap=True)
    found, expected = metrics_of(stopped), metrics_of(plain)
    for one, other in zip(found, expected, strict=True):
        cut = RATES if one["kind"] == "train" else ()  # a stop adds up such sums over ranks in two parts
        assert without(one, cut) == without(other, cut)
        assert [one[name] for name in cut] == pytest.approx([other[name] for name in cut], rel=1e-12)
    assert tensors_of_state(newest(stopped)) == tensors_of_state(newest(plain))


def test_what_is_prefetched_when(process, data, tmp_path):
    """The next batch is begun before a step's forward pass and sent behind it, unless something looks in between."""
    when = ["trainer.checkpoint.every=5", "trainer.max_steps=8", f"trainer.batch_size={BATCH}"]
    trainer = Trainer(load_config(arguments(data, tmp_path / "run", *when), ""), process)
    assert not trainer.engine.pipeline.overlaps
    trainer.engine.pipeline.overlaps, happened = True, []
    for name in ("begin", "begin_step", "send_begun"):
        noted = functools.partial(
            lambda name, call, *a, **k: (happened.append((trainer.engine.step, name)), call(*a, **k))[1], name
        )
        setattr(trainer.engine.tables, name, functools.partial(noted, getattr(trainer.engine.tables, name)))
    trainer.fit()
    begun_in = [step for step, name in happened if name == "begin"]
    assert begun_in == [0, 0, 1, 2, 3, 5, 5, 6]  # a state behind 5 steps; log lines behind 3 and 6 do not count
    assert [name for step, name in happened if step == 1] == ["begin_step", "begin", "send_begun"]
