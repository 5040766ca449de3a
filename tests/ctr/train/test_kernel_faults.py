"""What kernels on a GPU skip and note is asked for where the host waits anyway, and before anything rests on it."""

import sys
from collections import Counter

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.daily.loop import Daily
from tessera.ctr.train.engine import Engine
from tessera.ctr.train.trainer import Trainer
from tessera.kernels import backend
from tests.ctr.daily.days import OPTIONS, write_days
from tests.ctr.train.states import arguments, newest, write_data

NO_TTL = ["embedding=dynamic", "trainer.batch_size=50"]  # expiry asks by itself


class Asked:
    """Stands for `backend.check`: counts who asks, and raises what a kernel noted in step `spoilt` or later."""

    def __init__(self, monkeypatch, spoilt=None):
        self.by, self._spoilt, self._done, self._inside = Counter(), spoilt, 0, False
        self._step = Engine.train_step
        monkeypatch.setattr(backend, "check", self.check)
        monkeypatch.setattr(Engine, "train_step", lambda engine, batch: self.step(engine, batch))

    def step(self, engine, batch):
        self._inside = True
        done = self._step(engine, batch)
        self._inside, self._done = False, self._done + 1
        return done

    def check(self, device):
        assert not self._inside, "a step does not wait"
        self.by[sys._getframe(1).f_code.co_name] += 1
        if self._spoilt is not None and self._done >= self._spoilt:
            raise IndexError("rows: expected below 16, found 99")


def test_a_run_asks_at_log_lines_saves_and_evaluations_and_never_in_a_step(process, monkeypatch, tmp_path):
    data, asked = write_data(tmp_path / "data", 450), Asked(monkeypatch)
    every = ["trainer.checkpoint.every=4", "trainer.eval_every=6"]
    Trainer(load_config([*arguments(data, tmp_path / "run", *NO_TTL, *every)], ""), process).fit()
    # 9 steps: log lines behind 3, 6, 9 and at the end; states of 4, 8, 9; the splits of 6, 9 and of the report.
    assert asked.by == {"interval": 4, "save": 3, "evaluate": 3, "end": 1}


def test_a_day_asks_before_it_is_saved_and_published(process, monkeypatch, tmp_path):
    data, asked = write_days(tmp_path / "data", 2), Asked(monkeypatch)
    Daily(load_config([*arguments(data, tmp_path / "run", *OPTIONS)], "daily"), process).run()
    assert asked.by == {"interval": 2, "save": 2, "evaluate": 2, "train_day": 2}


def test_what_a_kernel_skipped_ends_the_run_before_it_is_saved(process, monkeypatch, tmp_path):
    data, asked = write_data(tmp_path / "data", 450), Asked(monkeypatch, spoilt=5)
    every = ["trainer.checkpoint.every=2", "trainer.log_every=100", "trainer.checkpoint.overlap=false"]
    trainer = Trainer(load_config([*arguments(data, tmp_path / "run", *NO_TTL, *every)], ""), process)
    with pytest.raises(IndexError, match="found 99"):
        trainer.fit()
    trainer.log.close()
    assert newest(tmp_path / "run").name.endswith("4") and asked.by == {"save": 3}
    assert process.stage == "step 6: saving"
