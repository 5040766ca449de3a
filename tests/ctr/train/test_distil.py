"""Distillation: its loss in closed form, its teacher beside the model, its place in a run that stops and goes on."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchrec import KeyedJaggedTensor

from tessera.ctr.config import load_config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.labels import labels_of
from tessera.ctr.distil.config import DistilConfig
from tessera.ctr.distil.distillation import Distillation
from tessera.ctr.distil.teacher_logits import prepare
from tessera.ctr.models.tower import Tower
from tessera.ctr.train.state_parts import FoundState
from tessera.ctr.train.task_loss import soft_loss
from tessera.ctr.train.trainer import Trainer
from tessera.embedding.errors import ConfigError
from tests.ctr.train.funnel import options, write_funnel
from tests.ctr.train.states import (
    arguments,
    assert_same_end,
    metrics_of,
    newest,
    rows_of_state,
    tensors_of_state,
    write_data,
)
from tests.ctr.train.warm_ranks import WarmRanks
from tests.distributed.saved_tables import alone
from tests.ranks import on_ranks

ROWS, BATCH = 900, 100
SELF = ["trainer.distil.kind=self", "trainer.distil.temperature=2.0", "trainer.distil.weight=0.7"]
FREE = "model.dropout=0.0"


@pytest.fixture(scope="module")
def first(ranks, tmp_path_factory) -> tuple[Path, Path]:
    """The data of two days, and a run on the first of them."""
    folder = tmp_path_factory.mktemp("first")
    days = [write_data(folder / f"day{i}", ROWS, seed=i) for i in range(2)]
    command = arguments(days[0], folder / "run", f"trainer.batch_size={BATCH}")
    assert ranks.run(1, command, folder / "output") == [0], (folder / "output").read_text()
    return days[1], folder / "run"


def job(first: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    data, run = first
    common = [f"trainer.batch_size={BATCH}", f"trainer.warm_start.path={run}"]
    return arguments(data, run_dir, *common, *more)


def trained(ranks: WarmRanks, world: int, command: list[str], folder: Path, status: int = 0, end=None) -> str:
    output = folder / "output"
    output.unlink(missing_ok=True)
    assert ranks.run(world, command, output, end=end) == [status] * world, output.read_text()
    return output.read_text()


def batch_of(rows: int, weight: torch.Tensor) -> Batch:
    ids = KeyedJaggedTensor(["a"], torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(rows, dtype=torch.int32))
    number = torch.arange(rows).flip(0)
    return Batch(torch.zeros(rows, 0), ids, torch.zeros(rows, 1), weight, None, None, rows, number=number)


def test_the_loss_and_its_gradient_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    z, teacher = (5 * torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, tau, factor = torch.rand(64, generator=generator, dtype=torch.float64), 3.0, 0.4
    distil = Distillation(DistilConfig("self", temperature=tau, weight=factor))
    unknown = torch.arange(64) % 9 == 0
    scored = teacher.clone()
    scored[unknown] = float("nan")
    distil.begin_period(scored.flip(0))
    batch = batch_of(64, weight)
    z.requires_grad_()
    loss = distil.loss(z, batch)
    loss.backward()
    p, q = torch.sigmoid(z.detach() / tau), torch.sigmoid(teacher / tau)
    entropy = -(q * p.log() + (1 - q) * (1 - p).log())
    torch.testing.assert_close(loss.detach(), factor * (weight * entropy)[~unknown].sum())
    torch.testing.assert_close(z.grad, torch.where(unknown, 0.0, factor * weight * (p - q) / tau))
    # A student that says what its teacher says has nothing left to learn from it.
    same = teacher.clone().requires_grad_()
    distil.loss(same, batch).backward()
    assert same.grad.abs().max() < 1e-15


def test_the_loss_of_several_labels_in_closed_form():
    """In the rows in which each counts, by its weight; a number has the square, without a temperature."""
    labels = labels_of(["a", {"name": "b", "where": "a", "weight": 3.0}, {"name": "c", "loss": "mse"}])
    generator = torch.Generator().manual_seed(1)
    z, teacher = (2 * torch.randn(64, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    known = torch.rand(64, 3, generator=generator) < 0.8
    values = (torch.rand(64, 3, generator=generator) < 0.5).double() * known
    weight, tau, factor = torch.rand(64, generator=generator, dtype=torch.float64), 3.0, 0.4
    unscored = torch.arange(64) % 9 == 0
    distil = Distillation(
        DistilConfig("self", temperature=tau, weight=factor), "cpu", labels, soft_loss(labels, Tower(), 0, "batch")
    )
    distil.begin_period(torch.where(unscored[:, None], float("nan"), teacher).flip(0))
    loss = distil.loss(z.requires_grad_(), replace(batch_of(64, weight), labels=values, known=known), 64.0)
    (gradient,) = torch.autograd.grad(loss, z)
    counts = known & ~unscored[:, None]
    counts[:, 1] &= values[:, 0] == 1
    p, q = torch.sigmoid(z.detach() / tau), torch.sigmoid(teacher / tau)
    each = -(q * p.log() + (1 - q) * (1 - p).log()) * torch.tensor([1.0, 3.0, 0.0])
    pull = (p - q) / tau * torch.tensor([1.0, 3.0, 0.0])
    each[:, 2], pull[:, 2] = (z.detach() - teacher)[:, 2].square(), 2 * (z.detach() - teacher)[:, 2]
    scale = factor * weight[:, None] * counts
    torch.testing.assert_close(loss.detach(), (scale * each).sum())
    torch.testing.assert_close(gradient, scale * pull)


def distilled(process, data: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Train on a funnel by a teacher of another kind, then by the model itself; the tower's weights at the end."""
    teacher, name = folder / "teacher", f"{process.world_size}"
    weights = {}
    batch = [*SELF[1:], "trainer.distil.kind=batch", f"trainer.distil.teacher={teacher}"]
    for run, more in (("batch", batch), ("self", [*SELF, f"trainer.warm_start.path={teacher}"]), ("none", [])):
        model = "mmoe" if run == "self" else "shared_bottom"
        small = [] if model == "mmoe" else ["model.bottom=[8]", "model.head=[4]"]
        command = [one for one in options(data, folder / f"{run}-{name}", model, *more) if "model.hidden" not in one]
        trainer = Trainer(load_config([*command, *small], ""), process)
        trainer.fit()
        weights |= {f"{run}.{k}": v.detach().clone() for k, v in trainer.engine.network.dense_parameters().items()}
    return weights


@pytest.mark.slow
def test_several_labels_learn_from_a_teacher_of_theirs_on_1_and_2_ranks(tmp_path):
    data, teacher = write_funnel(tmp_path / "data"), tmp_path / "teacher"
    on_ranks(1, fit, options(data, teacher))
    (one,), (two, _) = on_ranks(1, distilled, data, tmp_path), on_ranks(2, distilled, data, tmp_path)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    pairs = [(one[name.replace("none.", "batch.")], value) for name, value in one.items() if name.startswith("none.")]
    assert any((a - b).abs().max() > 1e-4 for a, b in pairs), "the teacher matters"
    kept = sorted(path.parent.parent.name for path in (tmp_path / "self-2" / "teacher").rglob("train-00000.parquet"))
    assert kept == ["buy", "click", "click_and_buy"]
    other = [*options(data, tmp_path / "other"), "trainer.distil.kind=batch", f"trainer.distil.teacher={teacher}"]
    with pytest.raises(ConfigError, match="teacher .* answers click, buy; expected the labels of this run, click, b"):
        on_ranks(1, fit_begun, [*other, "data.schema.labels=[click, buy]"])


def fit(process, overrides: list[str]) -> None:
    Trainer(load_config(overrides, ""), process).fit()


def fit_begun(process, overrides: list[str]) -> None:
    Trainer(load_config(overrides, ""), process).begin()


def test_one_more_epoch_while_the_loss_to_the_teacher_falls():
    distil = Distillation(DistilConfig("self", max_epochs=5))
    distil.begin_period(torch.zeros(4))
    batch, wanted = batch_of(4, torch.full((4,), 0.5)), []
    for epoch, loss in enumerate((3.0, 2.0, 1.5, 1.6, 1.0), 1):
        z = torch.full((4,), loss)  # the teacher's probability is 1/2: the loss grows with |z|
        for _ in range(2):
            distil.loss(z, batch)
        distil.loss(9 * z, batch, count=False)
        other = Distillation(distil.config)  # what a state holds is enough to go on
        state = distil.state()
        saved = SimpleNamespace(training=state.training, ranks=1)
        other.load(FoundState(saved, alone(), is_own=True, optimizer={}, by_rank=[state.rank_tensors], warn=print))
        entropy = float((F.softplus(z) - z / 2)[0])
        assert other.end_epoch() == distil.end_epoch() == pytest.approx(entropy)
        assert other.state().training == distil.state().training
        wanted.append(distil.wants_more(epoch))
    assert wanted == [True, True, True, False, False]
    assert not Distillation(DistilConfig("self")).wants_more(1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.distil.kind=other"], "trainer.distil.kind is 'other'; expected none, self or batch"),
        (["trainer.distil.kind=batch"], "kind is batch and trainer.distil.teacher is None; expected a run folder"),
        (["trainer.distil.kind=self", "trainer.distil.teacher=x"], "kind is self and trainer.distil.teacher is x"),
        (["trainer.distil.temperature=0"], "trainer.distil.temperature is 0.0; expected a number above 0"),
        (["trainer.distil.weight=-1"], "trainer.distil.weight is -1.0; expected at least 0"),
        (["trainer.epochs=3", "trainer.distil.max_epochs=2"], "max_epochs is 2; expected at least trainer.epochs, 3"),
        (["trainer.replay.weight=-1"], "trainer.replay.weight is -1.0; expected at least 0"),
        (["embedding=static", "optimizer.sparse.old_rows_factor=0.5"], "old_rows_factor is 0.5; static tables"),
        (["embedding.init=oov"], "embedding.init is oov; expected embedding.oov=learned, found zeros"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(overrides, "")
    assert message in str(error.value)


def beside(process, command: list[str], other: list[str]) -> tuple[float, float, int]:
    """Train with a teacher; at every step ask a model that stays what it was. Largest difference, range, rows."""
    trainer, frozen = (Trainer(load_config(c, ""), process) for c in (command, other))
    prepare(trainer.engine, trainer.readers["train"], trainer.log.folder / "teacher")
    largest, low, high, rows = 0.0, 0.0, 0.0, 0
    for batch in trainer.readers["train"].epoch(0):
        trainer.engine.train_step(batch)
        frozen.engine.model.eval()
        with torch.no_grad():
            logits, _ = frozen.engine.model(batch)
        logits = logits[: batch.rows]
        teacher = trainer.engine.distil.logits[batch.number[: batch.rows]]
        largest = max(largest, float((teacher - logits).abs().max()))
        low, high, rows = min(low, float(logits.min())), max(high, float(logits.max())), rows + batch.rows
    for one in (trainer, frozen):
        one.log.close()
    return largest, high - low, rows


@pytest.mark.parametrize("kind", ["self", pytest.param("batch", marks=pytest.mark.slow)])  # 10 s
def test_the_teachers_logits_are_those_of_a_frozen_copy(first, tmp_path, kind):
    """On two ranks, while the model learns. The teacher of `batch` is the run that the model began with."""
    more = SELF if kind == "self" else ["trainer.distil.kind=batch", f"trainer.distil.teacher={first[1]}"]
    plain = job(first, tmp_path / "frozen")
    results = on_ranks(2, beside, job(first, tmp_path / "run", *more), plain)
    for largest, spread, _ in results:
        assert largest < 2e-6 < 0.05 < spread
    assert sum(rows for *_, rows in results) == ROWS


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])  # 10 s
def test_weight_zero_is_training_without_a_teacher_bit_for_bit(ranks, first, tmp_path, world):
    plain, distilled = tmp_path / "plain", tmp_path / "distilled"
    trained(ranks, world, job(first, plain), tmp_path)
    trained(ranks, world, job(first, distilled, *SELF, "trainer.distil.weight=0"), tmp_path)
    found, expected = newest(distilled), newest(plain)
    mine = tensors_of_state(found)
    for rank in range(world):
        mine.pop(f"rank/{rank}/distil_sums")
    assert mine == tensors_of_state(expected)
    assert rows_of_state(found) == rows_of_state(expected)


def test_two_ranks_learn_what_one_does_and_the_teacher_matters(ranks, first, tmp_path):
    folders = {world: tmp_path / str(world) for world in (0, 1, 2)}
    for world, folder in folders.items():
        trained(
            ranks,
            max(1, world),
            job(first, folder, FREE, "optimizer.sparse.lr=0.05", *(SELF if world else [])),
            tmp_path,
        )
    none, one, two = ({k: v for k, v in floats(newest(f)).items() if k.startswith("tower/")} for f in folders.values())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    assert any((none[name] - value).abs().max() > 1e-4 for name, value in one.items())


def floats(state: Path) -> dict[str, torch.Tensor]:
    return {
        name: torch.frombuffer(bytearray(value), dtype=torch.float32)
        for name, value in tensors_of_state(state, "tower/").items()
    }


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_never_was(ranks, first, tmp_path):
    """Within epochs that only the teacher asks for, and with rows of two ages; on 2 ranks."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = [*SELF, "trainer.distil.max_epochs=3", "trainer.checkpoint.every=4", "trainer.resume=auto"]
    more += ["optimizer.sparse.old_rows_factor=0.3", "embedding.oov=learned", "embedding.init=oov"]
    trained(ranks, 2, job(first, whole, *more), tmp_path)
    losses = [line["loss"] for line in metrics_of(whole) if line["kind"] == "distil"]
    assert len(losses) > 1
    assert len(losses) == 3 or losses[-1] >= losses[-2]
    command = job(first, parts, *more)
    for step in (6, 13):
        trained(ranks, 2, command, tmp_path, -signal.SIGKILL, (step, signal.SIGKILL, [0, 1]))
    shutil.move(parts / "teacher", tmp_path / "teacher")
    said = trained(ranks, 2, command, tmp_path, 2)
    assert "teacher has no logits of the teacher, and training is at step" in said
    shutil.move(tmp_path / "teacher", parts / "teacher")
    other = [*command, "trainer.distil.kind=batch", f"trainer.distil.teacher={first[1]}"]
    assert "teacher: kind is 'self'; the run has 'batch'" in trained(ranks, 2, other, tmp_path, 2)
    trained(ranks, 2, command, tmp_path)
    assert_same_end(parts, whole)


def test_nothing_learnt_is_no_teacher(ranks, first, tmp_path):
    command = [part for part in job(first, tmp_path / "run", *SELF) if "warm_start.path" not in part]
    said = trained(ranks, 1, command, tmp_path, 2)
    assert "trainer.distil.kind is self; expected trainer.warm_start.path" in said.splitlines()[-1]
    other = job(first, tmp_path / "other", "trainer.distil.kind=batch", "trainer.distil.teacher=nowhere")
    assert "nowhere is not a run folder" in trained(ranks, 1, other, tmp_path, 2).splitlines()[-1]
