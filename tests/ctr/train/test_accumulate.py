"""Several batches of one step: equal to one batch of all their rows."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path

import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.train.trainer import Trainer
from tessera.embedding.errors import ConfigError
from tests.ctr.train.funnel import options, write_funnel
from tests.ctr.train.states import arguments, assert_same_end, metrics_of, write_data
from tests.ranks import on_ranks

ROWS = 1000  # of 240 in a step: the last one of an epoch has 40 rows, in one batch of the three
PLAIN = ["trainer.shuffle=false", "data.lanes=2", "trainer.epochs=2", "data.valid=null", "data.test=null"]
SETTINGS = {
    "adam": ["optimizer.sparse.name=adam", "optimizer.dense.name=adamw", "optimizer.dense.weight_decay=0.1"],
    "decayed and clipped": [
        *("optimizer.sparse.name=adagrad", "optimizer.sparse.decay=0.3", "optimizer.sparse.decay_count_power=0.5"),
        *("optimizer.sparse.clip_norm=0.003", "optimizer.dense.clip_norm=0.05", "optimizer.dense.ema.decay=0.9"),
        *("embedding.l2=0.001", "embedding.oov=learned", "optimizer.sparse.warmup_steps=4"),
        "optimizer.dense.schedule={kind: cosine, steps: 8}",
    ],
    "rows of sums": ["embedding.pooled_output_dist=always", "optimizer.sparse.name=ftrl"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_funnel(tmp_path_factory.mktemp("data") / "data", ROWS)


def overrides(data: Path, run_dir: Path, batch: int, accumulate: int, *more: str) -> list[str]:
    given = options(data, run_dir, "mmoe", *PLAIN, "trainer.log_every=1", *more)
    given = [one for one in given if not one.startswith(("trainer.batch_size", "trainer.log_every=5"))]
    return [*given, f"trainer.batch_size={batch}", f"trainer.accumulate={accumulate}", "export.check=never"]


def train(process, data: Path, run_dir: Path, batch: int, accumulate: int, *more: str) -> dict:
    """Loss and rows of each step, dense weights and rows of tables at the end."""
    trainer = Trainer(load_config(overrides(data, run_dir, batch, accumulate, *more), ""), process)
    trainer.fit()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [one for one in lines if one["kind"] == "train"]
    engine, rows = trainer.engine, {}
    for name, table in engine.dynamic.owned().items():
        for batch_of in table.export_rows():
            for i, row in enumerate(batch_of.ids.tolist()):
                rows[name, row] = (batch_of.values[i].view(torch.float32), int(batch_of.count[i]))
    dense = {name: one.detach().clone() for name, one in engine.network.dense_parameters().items()}
    return {"steps": steps, "rows": rows, "dense": copy.deepcopy(dense)}


def assert_equal_runs(many: list[dict], whole: dict) -> None:
    one = many[0]
    assert [step["step"] for step in one["steps"]] == [step["step"] for step in whole["steps"]] == list(range(1, 11))
    for mine, other in zip(one["steps"], whole["steps"], strict=True):
        assert mine["rows"] == other["rows"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["dense_lr"] == other["dense_lr"] and mine["sparse_lr"] == other["sparse_lr"]
    for name, weight in whole["dense"].items():
        torch.testing.assert_close(one["dense"][name], weight, rtol=1e-3, atol=2e-5, msg=name)
    rows = {key: value for part in many for key, value in part["rows"].items()}
    assert rows.keys() == whole["rows"].keys()
    for key, (values, count) in whole["rows"].items():
        assert rows[key][1] == count
        torch.testing.assert_close(rows[key][0], values, rtol=1e-3, atol=2e-5, msg=str(key))


@pytest.mark.parametrize(
    "setting", ["decayed and clipped", *(pytest.param(one, marks=pytest.mark.slow) for one in ("adam", "rows of sums"))]
)
def test_batches_of_one_step_are_one_batch_of_all_their_rows(process, data, tmp_path, setting):
    whole = train(process, data, tmp_path / "whole", 240, 1, *SETTINGS[setting])
    many = train(process, data, tmp_path / "many", 80, 3, *SETTINGS[setting])
    assert_equal_runs([many], whole)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_so_it_is_on_two_ranks(data, tmp_path, setting):
    (whole,) = on_ranks(1, train, data, tmp_path / "whole", 240, 1, *SETTINGS[setting])
    many = on_ranks(2, train, data, tmp_path / "many", 80, 3, *SETTINGS[setting])
    assert_equal_runs(many, whole)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_ends_inside_a_step_goes_on_from_whole_ones(ranks, tmp_path, world):
    """15 batches of an epoch are 4 steps of 4 batches, the last one of 3. SIGKILL in batch 3 of step 3, then
    SIGTERM in its batch 2, which ends the step first."""
    data = write_data(tmp_path / "data", 1500)
    loop = ["trainer.batch_size=100", "trainer.accumulate=4", "trainer.epochs=2", "trainer.resume=auto"]
    loop += ["trainer.checkpoint.every=2", "trainer.eval_every=3", "embedding.ttl_days=2", "embedding.expire_every=2"]
    loop += ["optimizer.sparse.decay=0.3", "embedding.format=int8", "embedding.max_rows=2000", "embedding.eviction=lru"]
    whole, parts = (arguments(data, tmp_path / name, *loop) for name in ("whole", "parts"))

    def trained(command: list[str], status: int, at: tuple | None = None) -> str:
        output = tmp_path / "output"
        output.unlink(missing_ok=True)
        assert ranks.run(world, command, output, at=at) == [status] * world, output.read_text()
        return output.read_text()

    trained(whole, 0)
    trained(parts, -signal.SIGKILL, ("step 2: backward, batch 3", signal.SIGKILL, list(range(world))))
    said = trained(parts, 75, ("step 2: backward, batch 2", signal.SIGTERM, [0]))
    assert "step 2 · goes on from" in said and "step 3 · stopped by SIGTERM, state saved" in said
    said = trained(parts, 0)
    assert "step 3 · goes on from" in said
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    assert [line["step"] for line in metrics_of(tmp_path / "whole") if line["kind"] == "train"] == [3, 6, 8]


@pytest.mark.parametrize(
    ("overrides_", "said"),
    [
        (["embedding=static"], "and static tables update rows in each batch; expected embedding=dynamic"),
        (["optimizer.helen.rho=0.05"], "and optimizer.helen.rho makes steps of two passes over one batch"),
        (["embedding.format=int8", "embedding.alpt.every=2"], "and embedding.alpt.every makes steps of two passes"),
        (["trainer.loss_divisor=task"], "and trainer.loss_divisor is task, which divides by the rows of one batch"),
        (["embedding.cache_rows=500"], "and cache_rows is 500; expected null, or accumulate=1"),
    ],
)
def test_what_a_step_of_several_batches_cannot_have(overrides_, said):
    with pytest.raises(ConfigError, match=f"trainer.accumulate is 2, {said}"):
        load_config(["data=synthetic", "trainer.accumulate=2", *overrides_], "")
    with pytest.raises(ConfigError, match="trainer.accumulate is 0; expected at least 1"):
        load_config(["data=synthetic", "trainer.accumulate=0"], "")
