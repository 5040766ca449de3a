"""Gates on fields: frozen at 1 nothing changes, at 0 a field is gone, and what each method computes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tessera.ctr import network as network_module
from tessera.ctr.config import load_config
from tessera.ctr.models.deepfm import DeepFM
from tessera.ctr.models.numeric import ScaledVectors
from tessera.ctr.selection.autofield import AutoField
from tessera.ctr.selection.config import SelectionConfig, refuse_gates
from tessera.ctr.selection.field_groups import field_groups
from tessera.ctr.selection.gates import GATES, LPFS, ConcreteDropout, FieldGates, attach
from tessera.ctr.selection.optfs import OptFS
from tessera.distributed.saved.dense import load_tensors
from tessera.embedding.errors import ConfigError
from tessera.kernels.random import row_keys, uniform
from tests.ctr.selection.fields import ROWS, batch_of, fields_with, network_of, schema_with
from tests.ctr.train.states import (
    arguments,
    assert_same_end,
    newest,
    open_folder,
    rows_of_state,
    tensors_of_state,
    write_data,
)
from tests.ranks import on_ranks

SIX = field_groups(schema_with(sequences=True))[:3]


def train(process, folder: Path, name: str, *overrides: str) -> None:
    from tessera.ctr.train.trainer import Trainer

    config = load_config(arguments(folder / "data", folder / name, "trainer.batch_size=100", *overrides), "")
    if name == "frozen":
        network_module.make_gates = lambda _, schema, *rest: FieldGates(field_groups(schema))
    Trainer(config, process).fit()


def frozen_and_learned(process, folder: Path) -> None:
    train(process, folder, "plain")
    train(process, folder, "dropout", "selection.method=dropout")
    train(process, folder, "frozen")


def test_gates_frozen_at_1_train_to_the_same_bits_and_learned_ones_are_written(tmp_path):
    write_data(tmp_path / "data", 300, 100)
    on_ranks(1, frozen_and_learned, tmp_path)
    assert_same_end(tmp_path / "frozen", tmp_path / "plain")
    told = json.loads((tmp_path / "dropout" / "importance" / "dropout" / "importance.json").read_text())
    found = load_tensors(open_folder(tmp_path / "dropout" / "best"), lambda name: "field_gates" in name)
    kept = torch.sigmoid(-found["tower/field_gates.theta"]).tolist()
    values = {one["name"]: one["importance"] for one in told["fields"]}
    assert values == pytest.approx(dict(zip(("x", "row", "c", "d"), kept, strict=True)))
    assert [one["rank"] for one in told["fields"]] == [1, 2, 3, 4] and len(set(kept)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dropout", "lpfs", "autofield", "optfs"])
def test_gates_do_not_depend_on_the_number_of_ranks(tmp_path, method):
    write_data(tmp_path / "data", 600, 100)
    gates = []
    for world in (1, 2):
        on_ranks(world, train, tmp_path, f"on-{world}", f"selection.method={method}", "trainer.epochs=2")
        gates.append(load_tensors(open_folder(tmp_path / f"on-{world}" / "best"), lambda name: "field_gates" in name))
    assert gates[0]
    for name in gates[0]:
        torch.testing.assert_close(gates[0][name], gates[1][name], rtol=1e-4, atol=1e-6)


class Fixed(FieldGates):
    def __init__(self, groups, values):
        super().__init__(groups)
        self.values = values

    def now(self):
        return self.values


def test_a_gate_of_0_takes_a_field_away_and_its_first_order_weight():
    torch.manual_seed(1)
    schema = schema_with(sequences=False)
    fields, groups, batch = fields_with(schema, ScaledVectors), field_groups(schema), batch_of(schema)
    tower = DeepFM(fields, 4, [5], 0.0, batch_norm=False)
    network = network_of(tower, schema, fields)
    embeddings, numbers = network.tables(batch.ids), len(schema.numeric_names)
    expected = []
    for group in groups:
        numeric, found = batch.numeric.clone(), {name: one.clone() for name, one in embeddings.items()}
        for at in group.fields:
            if at < numbers:
                numeric[:, at] = 0  # of which a scaled vector is 0
            else:
                for one in found.values():
                    one[:, at - numbers] = 0
        expected.append(tower(numeric, found))
    gates = Fixed(groups, torch.ones(len(groups)))
    tower.float()
    attach(gates, tower, fields, ScaledVectors)
    tower.double()
    assert torch.equal(network.of_tower(batch, embeddings), tower(batch.numeric, embeddings))
    for number, without in enumerate(expected):
        gates.values = torch.ones(len(groups), dtype=torch.float64)
        gates.values[number] = 0
        torch.testing.assert_close(network.of_tower(batch, embeddings), without)
    gates.values = torch.ones(ROWS, len(groups), dtype=torch.float64)
    gates.values[3, 0] = 0
    changed = network.of_tower(batch, embeddings)
    torch.testing.assert_close(changed[3], expected[0][3])
    gates.values = torch.ones(len(groups))
    torch.testing.assert_close(changed[:3], network.of_tower(batch, embeddings)[:3])


def test_concrete_dropout_is_the_formula_and_its_mean_the_probability():
    gates = ConcreteDropout(SIX, penalty=0.01, temperature=0.1)
    with torch.no_grad():
        gates.theta.copy_(torch.tensor([-2.0, 0.0, 1.5]))
    p = torch.sigmoid(gates.theta.detach())
    place = torch.arange(20_000)
    gates.begin_step(7, 3, place)
    drawn = gates.now().detach()
    u = uniform(0, GATES, row_keys(7, GATES, place, 3), 3).double()
    d = torch.sigmoid((p.double().log() - (1 - p.double()).log() + u.log() - (1 - u).log()) / 0.1)
    torch.testing.assert_close(drawn.double(), 1 - d, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(drawn.mean(0), 1 - p, atol=0.02, rtol=0)
    assert float(gates.penalty().detach()) == pytest.approx(0.01 * float((1 - p).sum()))
    gates.eval()
    torch.testing.assert_close(gates.now(), 1 - p)


def test_autofield_draws_by_the_formula_and_learns_by_adam():
    gates = AutoField(SIX, lr=0.1, cooling=0.001)
    gates.begin_step(7, 500, None)
    u = uniform(7, GATES, torch.arange(3), 4, 500).double()
    noise = -torch.log(-torch.log(u))
    expected = torch.softmax((math.log(0.5) + noise[:, :2]) / 0.5, 1)[:, 0]
    torch.testing.assert_close(gates.now().double(), expected, rtol=1e-4, atol=1e-6)
    other = torch.zeros(3, 2, requires_grad=True)
    adam = torch.optim.Adam([other], lr=0.1)
    for step in range(5):
        with gates.learning(7, 500 + step) as logits:
            loss = (gates.now() * torch.tensor([1.0, -1.0, 0.0])).sum()  # the second field is worth keeping
            (gradient,) = torch.autograd.grad(loss, logits)
        gates.learn(gradient)
        other.grad = gradient
        adam.step()
    torch.testing.assert_close(gates.learned, other.detach())
    gates.eval()
    torch.testing.assert_close(gates.now(), torch.softmax(other.detach(), 1)[:, 0])
    assert gates.now()[0] < 0.5 < gates.now()[1] and gates.now()[2] == 0.5
    gates.begin_step(7, 10_000, None)
    gates.train()
    assert all(min(abs(x), abs(1 - x)) < 1e-3 for x in gates.now().tolist())  # cold: in or out


def test_optfs_gates_each_id_and_says_what_is_kept():
    schema = schema_with(sequences=False)
    groups, fields = field_groups(schema), fields_with(schema, ScaledVectors)
    gates = OptFS(groups, fields, l1=0.1, sharpest=100.0, steps=4)
    stored = torch.tensor([[0.1, -0.2, 0.0], [-0.9, 0.3, 0.2]]).unsqueeze(2)
    numeric, vectors = torch.ones(2, 3), torch.ones(2, 3, 4)
    for step in range(5):
        passed = gates.begin_pass((numeric, {"v": vectors, "gate": stored}))
        assert set(passed[1]) == {"v"}
        tau = 100 ** (step / 4)
        expected = torch.sigmoid((0.5 + stored) * tau) / torch.sigmoid(torch.tensor(0.5))
        torch.testing.assert_close(gates("v", 3, vectors, None), expected.expand(2, 3, 4))
        of_numbers = torch.sigmoid(torch.tensor(0.5 * tau)) / torch.sigmoid(torch.tensor(0.5))
        torch.testing.assert_close(gates("values", 0, vectors, None), of_numbers.expand(2, 3, 4))
        penalty = 0.1 * ((0.5 + stored).abs().sum() + 2 * 3 * 0.5)
        torch.testing.assert_close(gates.penalty().detach(), penalty)
        gates.after_step(0.0)
    now = {"a": 0.3, "item": 0.55, "bag": 0.7}  # (0.6 + 0) / 2, (0.3 + 0.8) / 2, and 0.7 alone: the other bag is empty
    for group, mean in zip(groups, gates.importance().tolist(), strict=True):
        expected = 0.5 + (now.get(group.name, 0.5) - 0.5) * (1 - 0.99**5)
        assert mean == pytest.approx(expected, rel=1e-5)


def stop_and_go_on(process, folder: Path) -> None:
    held = ["selection.method=autofield", "selection.every=2", "selection.lr=0.05", "trainer.epochs=3"]
    train(process, folder, "whole", *held)
    train(process, folder, "stopped", *held, "trainer.max_steps=4")
    train(process, folder, "stopped", *held, "trainer.resume=auto")


@pytest.mark.slow
def test_autofield_goes_on_where_it_was_stopped(tmp_path):
    write_data(tmp_path / "data", 300, 250)  # 3 batches of each epoch's valid split: the second run begins inside
    on_ranks(1, stop_and_go_on, tmp_path)
    # The stop was an end, with an evaluation of its own: what is trained is the same, bit for bit, the log is not.
    mine, other = newest(tmp_path / "stopped"), newest(tmp_path / "whole")
    assert mine.name == other.name and tensors_of_state(mine) == tensors_of_state(other)
    assert any("field_gates.moments" in name for name in tensors_of_state(mine))
    assert rows_of_state(mine) == rows_of_state(other)


def test_lpfs_begins_at_1_is_odd_and_is_pulled_to_0():
    gates = LPFS(SIX, threshold=0.01, eps=0.1, eps_decay=0.9978)
    assert torch.equal(gates.now(), torch.ones(3))
    with torch.no_grad():
        gates.x.copy_(torch.tensor([0.5, -0.5, 0.00005]))

    def published(x: float, eps: float) -> float:
        return x * abs(x) / (x * x + eps) + 10 * eps**0.5 * float(torch.atan(torch.tensor(x)))

    expected = published(0.5, 0.1) / published(1.0, 0.1)
    assert gates.now().tolist()[:2] == pytest.approx([expected, -expected], rel=1e-5)
    gates.after_step(0.01)
    assert gates.x.tolist() == pytest.approx([0.4999, -0.4999, 0.0])
    for _ in range(99):
        gates.after_step(0.0)
    eps = 0.1 * 0.9978
    assert gates.now().tolist()[0] == pytest.approx(published(0.4999, eps) / published(1.0, eps), rel=1e-5)
    assert gates.now()[2] == 0 and torch.autograd.grad(gates.now()[2], gates.x)[0][2] > 0  # it can come back


MISTAKES = {
    "selection.cooling=0.1": "selection.cooling is 0.1, which only selection.method=autofield reads; it is none",
    "selection.every=3": "selection.every is 3, which only selection.method=autofield or dnis reads; it is none",
    "selection.l1=0.1": "selection.l1 is 0.1, which only selection.method=optfs reads; it is none",
    "selection.method=dropot": "selection.method is 'dropot'",
    "selection.penalty=0.1": "selection.penalty is 0.1, which only selection.method=dropout reads; it is none",
    "selection.eps=0": "selection.eps is 0",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line(override):
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        load_config([override], "")


def test_what_gates_are_not_for():
    with pytest.raises(ConfigError, match="selection.method is lpfs; expected trainer.compile=false"):
        load_config(["selection.method=lpfs", "trainer.compile=true"], "")
    with pytest.raises(ConfigError, match=r"selection.method is lpfs, .*\(data.drop\)"):
        refuse_gates(SelectionConfig(method="lpfs"), "an export")
    refuse_gates(SelectionConfig(), "an export")
    for method, other, message in (
        ("autofield", "data.valid=null", "learns on data.valid, and it is null"),
        ("autofield", "data.negative_rate=0.5", "data.negative_rate is 0.5; expected 1"),
        ("optfs", "trainer.accumulate=2", "trainer.accumulate is 2; expected 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config([f"selection.method={method}", other], "")
    schema = schema_with(sequences=True)
    with pytest.raises(ConfigError, match=r"optfs, and 'seen' is read event by event \(pooling: none\)"):
        OptFS(field_groups(schema), fields_with(schema, ScaledVectors), 0.1, 10.0, 10)
