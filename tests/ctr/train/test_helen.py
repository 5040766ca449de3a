"""Helen in training: one step by hand, any number of ranks, and a kill between the passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower
from tessera.ctr.tables import build_tables
from tessera.ctr.train.engine import Engine
from tessera.ctr.train.evaluate import read_split
from tessera.embedding.errors import ConfigError
from tests.ctr.train.states import arguments, assert_same_end, write_data
from tests.ranks import PYTHONPATH, ROOT, on_ranks, torchrun

RHO, XI, LR = 0.5, 0.4, 0.125
SGD = [f"optimizer.{side}={{name: sgd, lr: {LR}}}" for side in ("sparse", "dense")]
HELEN = [f"optimizer.helen.rho={RHO}", f"optimizer.helen.xi={XI}"]
PLAIN = ["trainer.batch_size=40", "model.dropout=0", "embedding.oov=learned", "optimizer.dense.clip_norm=5"]


def engine_of(process, overrides):
    config = load_config(overrides, "")
    schema = Schema(config.data.schema)
    return Engine(config, schema, process), read_split(config, schema, process, "train")


def steps(process, overrides, count):
    """Train some steps; give the losses, the dense weights and the rows of column c by id."""
    engine, reader = engine_of(process, overrides)
    losses = []
    for batch in engine.pipeline.feed(reader.epoch(0), begins=True):
        losses.append(engine.train_step(batch)[0])
        if engine.step == count:
            break
    table = engine.dynamic.owned()["c"]
    rows = {}
    for one in table.export_rows():
        rows |= dict(zip(one.ids.tolist(), table.gather(one.rows), strict=True))
    dense = {name: value.detach().clone() for name, value in engine.network.dense_parameters().items()}
    return torch.stack(losses), dense, rows


def one_step_by_hand(process, overrides, dense):
    """A step by the engine, after one that brought all ids of its batch, and by autograd over the same rows in
    float64. Returns (loss, weights, rows of the batch) of both."""
    engine, reader = engine_of(process, overrides)
    batch = next(iter(reader.epoch(0)))
    engine.train_step(batch)
    network = engine.network
    names, groups = network.id_names, list(network.tower.embedding_dims)
    ids = batch.ids.values().view(len(names), -1)
    network.eval()
    before = {group: rows.detach().double() for group, rows in network.tables(batch.ids).items()}
    network.train()
    weights = [one for one in network.tower.parameters()]
    start = [one.detach().double() for one in weights]
    found_loss = engine.train_step(batch)[0].double()
    found_weights = [one.detach().double() for one in weights]
    network.eval()
    found_rows = {group: rows.detach().double() for group, rows in network.tables(batch.ids).items()}

    tower = network.tower.double()
    inverse = [one.unique(return_inverse=True)[1] for one in ids]

    def leaves_of(rows):
        """(group, field) -> rows of the distinct ids."""
        found = {}
        for group in groups:
            for field, own in enumerate(inverse):
                one = rows[group].new_zeros(int(own.max()) + 1, rows[group].shape[2])
                one[own] = rows[group][:, field]
                found[group, field] = one.requires_grad_()
        return found

    def gradients(rows, values):
        with torch.no_grad():
            for one, value in zip(weights, values, strict=True):
                one.copy_(value)
        looked_up = {g: torch.stack([rows[g, f][own] for f, own in enumerate(inverse)], 1) for g in groups}
        logits = tower(batch.numeric.double(), looked_up)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels[:, 0].double())
        found = torch.autograd.grad(loss, [*rows.values(), *weights])
        return loss * len(ids[0]), dict(zip(rows, found, strict=False)), found[len(rows) :]

    rows = leaves_of(before)
    loss, of_rows, of_weights = gradients(rows, start)
    moved = {}
    for (group, field), one in rows.items():
        counts = torch.bincount(inverse[field]).double()
        share, g = (counts / counts.max()).clamp(min=XI), of_rows[group, field]
        moved[group, field] = (one + RHO * share[:, None] * g / g.norm()).detach().requires_grad_()
    values = start
    if dense:
        # The learned row of ids without one is a dense weight, too: all ids have rows, so it has no gradient.
        norm = torch.stack([g.square().sum() for g in of_weights]).sum().sqrt()
        values = [one + RHO * g / norm for one, g in zip(start, of_weights, strict=True)]
    _, second, second_weights = gradients(moved, values)
    made = [one - LR * g for one, g in zip(start, second_weights if dense else of_weights, strict=True)]
    after = {key: (one - LR * second[key]).detach() for key, one in rows.items()}
    looked_up = {g: torch.stack([after[g, f][own] for f, own in enumerate(inverse)], 1) for g in groups}
    return (found_loss, found_weights, found_rows), (loss.detach(), made, looked_up)


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_is_the_one_made_by_hand(dense, tmp_path):
    data = write_data(tmp_path / "data", 40)
    overrides = arguments(data, tmp_path / "run", *PLAIN, *SGD, *HELEN, f"optimizer.helen.dense={str(dense).lower()}")
    ((found, expected),) = on_ranks(1, one_step_by_hand, overrides, dense)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_one_and_two_ranks_learn_the_same_and_another_thing_than_one_pass(dense, tmp_path):
    data = write_data(tmp_path / "data", 200)
    admission = ["embedding.admission.kind=exact", "embedding.admission.threshold=2", "model.batch_norm=true"]
    fixed = arguments(data, tmp_path / "run", *PLAIN, *SGD, *admission, "embedding.l2=1e-3")
    helen = [*HELEN, f"optimizer.helen.dense={str(dense).lower()}"]
    ((losses, weights, rows),) = on_ranks(1, steps, [*fixed, *helen], 2)
    one, other = on_ranks(2, steps, [*fixed, *helen], 2)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(one[0] + other[0], losses, **close)
    torch.testing.assert_close(one[1], weights, **close)
    torch.testing.assert_close(one[2] | other[2], rows, **close)
    ((once, _, _),) = on_ranks(1, steps, fixed, 2)
    assert torch.equal(once[:1], losses[:1]), "the loss is that of the first pass"
    assert (once - losses).abs()[-1] > 1e-3


def test_a_model_without_ids_is_refused(tmp_path):
    only = "data.schema.features=[{name: x, kind: numeric}]"
    config = load_config([*arguments(tmp_path, tmp_path, "model=dnn", only), *HELEN], "")
    schema = Schema(config.data.schema)
    with pytest.raises(ConfigError) as error:
        build_tables(config, schema, build_tower(config, schema), 1)
    said = f"optimizer.helen.rho is {RHO}, but no feature has ids, so no rows can be perturbed; set rho=0"
    assert str(error.value) == said


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_kill_between_the_passes_leaves_the_rows_that_were_saved_last(overlap, tmp_path):
    data = write_data(tmp_path / "data", 1000)
    options = ["trainer.batch_size=100", "trainer.checkpoint.every=4", "trainer.epochs=2", *HELEN]
    options += [f"trainer.checkpoint.overlap={overlap}", "optimizer.sparse.name=adam"]
    whole = tmp_path / "whole"
    done = torchrun(2, "scripts/train.py", *arguments(data, whole, *options))
    assert done.returncode == 0, done.stderr
    job = ["tests/ctr/train/killed_between_passes_job.py", *arguments(data, tmp_path / "run", *options)]
    environment = {"KILL_MARKER": str(tmp_path / "killed"), "KILL_AT": "13", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    done = subprocess.run(
        [sys.executable, *launcher, *job],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert Path(environment["KILL_MARKER"]).exists() and "goes on from" in done.stdout
    assert_same_end(tmp_path / "run", whole)
