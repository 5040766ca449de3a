"""The average of the dense weights: its closed form, what has it, and that states hold it on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.daily.loop import Daily
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.saved.dense import load_tensors
from tessera.embedding.errors import ConfigError
from tests.ctr.daily.days import command, key_of, write_days
from tests.ctr.train.states import arguments, newest, open_folder, write_data
from tests.ctr.train.test_dense_optimizer import NAMES, optimizers_of, steps
from tests.ranks import on_ranks

EMA = ["optimizer.dense.ema.decay=0.6", "optimizer.dense.lr=0.05"]


def test_it_is_the_weighted_sum_of_all_weights_so_far_and_goes_on_in_another_process():
    optimizers, named = optimizers_of(*EMA)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        steps(optimizers, named, step - 1, step)
        keep = 0.0 if step == 1 else min(0.6, step / (step + 9))
        for name in NAMES:
            expected[name] = keep * expected.get(name, torch.zeros(3)).double() + (1 - keep) * named[name].detach()
        if step == 4:  # goes on from its state
            found = {name.removeprefix("optimizer/"): one.clone() for name, one in optimizers.state().tensors.items()}
            schedule = optimizers.state().training["schedule"]
            optimizers, named = optimizers_of(*EMA, weights={name: one.detach() for name, one in named.items()})
            optimizers.take_over(found, **schedule)
    trained = {name: one.detach().clone() for name, one in named.items()}
    with optimizers.evaluated():
        for name in NAMES:
            torch.testing.assert_close(named[name].detach().double(), expected[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(named[name], trained[name]) for name in NAMES)
    off, weights = optimizers_of(*EMA, "optimizer.dense.ema.evaluate=false")
    steps(off, weights, 0, 3)
    trained = {name: one.detach().clone() for name, one in weights.items()}
    with off.evaluated():
        assert all(torch.equal(weights[name], trained[name]) for name in NAMES)
    assert f"optimizer/{NAMES[0]}/average" in off.state().tensors
    with pytest.raises(ConfigError, match="evaluate is False, which needs optimizer.dense.ema.decay"):
        load_config(["optimizer.dense.ema.evaluate=false"], "")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", 120, valid=40)


def run(process, data: Path, run_dir: Path, steps: int) -> tuple[dict, dict]:
    """Train up to a number of steps, from the newest state; return the trained weights and the averages."""
    more = ["trainer.batch_size=20", f"trainer.max_steps={steps}", "trainer.resume=auto", "trainer.epochs=9", *EMA]
    trainer = Trainer(load_config(arguments(data, run_dir, *more), ""), process)
    optimizers, network = trainer.engine.optimizers, trainer.engine.network
    for batch in trainer.readers.train_batches(trainer.engine, trainer.log):
        trainer.engine.train_step(batch)
        if trainer.finished:
            break
    trained = {name: one.detach().clone() for name, one in network.dense_parameters().items()}
    with optimizers.evaluated():
        averages = {name: one.detach().clone() for name, one in network.dense_parameters().items()}
    trainer.evaluate()
    trainer.checkpoints.save()
    trainer.checkpoints.close()
    trainer.log.close()
    return trained, averages


def test_the_kept_model_has_it_and_a_state_of_two_ranks_goes_on_on_one(data, tmp_path):
    (first, averages), other = on_ranks(2, run, data, tmp_path / "a", 3)
    assert all(torch.equal(other[1][name], value) for name, value in averages.items())
    best = load_tensors(open_folder(tmp_path / "a" / "best"), lambda name: name.startswith("tower/"))
    assert best
    for name, value in best.items():
        assert torch.equal(value, averages[name.removeprefix("tower/")])
    assert any(not torch.equal(first[name], averages[name]) for name in averages)
    (trained, goes_on), *_ = on_ranks(1, run, data, tmp_path / "a", 5)
    (whole, expected), *_ = on_ranks(1, run, data, tmp_path / "b", 5)
    for name, value in expected.items():
        torch.testing.assert_close(goes_on[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trained[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_over_days_publishes_it(process, tmp_path):
    """An export of the publication is compared with the live model on the way, too."""
    data, run_dir = write_days(tmp_path / "data", 2), tmp_path / "run"
    keys = command(data, run_dir, *EMA, "export.published=true")
    Daily(load_config(keys, ""), process).run()
    state = load_tensors(open_folder(newest(run_dir)), lambda name: True)
    published = load_tensors(open_folder(run_dir / "published" / key_of(1)), lambda name: name.startswith("tower/"))
    assert published
    for name, value in published.items():
        assert torch.equal(value, state[f"optimizer/{name.removeprefix('tower/')}/average"])
    assert any(not torch.equal(state[name], value) for name, value in published.items())
