"""Models against layers of public packages with the same weights: deepctr-torch 0.3.0 (MMoE, PLE, ESMM, DIN, DIEN) and
the authors' code of HSTU's attention. They are found where `TESSERA_PEERS` says, a folder made by
`pip install --no-deps --target FOLDER deepctr-torch` and, of HSTU, with `generative_recommenders` of
github.com/meta-recsys/generative-recommenders in it; without them these tests are skipped.

deepctr-torch ends experts with ReLU, where ours are linear: their last biases are raised here, so that it passes all.
"""

import importlib
import os

import pytest
import torch
from torch import nn

from tessera.ctr.data.label_spaces import joint_logit
from tessera.ctr.models.hstu_attention import HSTUAttention
from tessera.ctr.models.numeric import Raw
from tessera.ctr.models.sequences import Dice
from tessera.ctr.models.tower import Events, Fields, SequenceGroup
from tests.ctr.models.test_over_labels import fields_of, make

pytestmark = pytest.mark.slow
COLUMNS = 3


@pytest.fixture
def peer(monkeypatch):
    def find(name: str):
        folder = os.environ.get("TESSERA_PEERS")
        if folder:
            monkeypatch.syspath_prepend(folder)
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not there ({error}); set TESSERA_PEERS to a folder that has it")

    return find


def dense_fields(labels) -> Fields:
    """Three numbers that go to the nets as they are, for both."""
    whole = fields_of(labels)
    return Fields(tuple(f"x{i}" for i in range(COLUMNS)), (), Raw, whole.labels, whole.outputs)


def given_to(model, tower) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of ours and probabilities of theirs for the same rows."""
    x = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(1))
    found = model.eval()(x)
    assert found.min() > 0.001 and found.max() < 0.999
    return tower.float()(x, {"v": torch.zeros(7, 0, 4)}), found


def copy_linear(theirs: nn.Module, ours: nn.Module) -> None:
    theirs.weight.data.copy_(ours.weight)
    if theirs.bias is not None:
        theirs.bias.data.copy_(ours.bias)
    else:
        ours.bias.data.zero_()


def copy_dnn(theirs: nn.Module, last: nn.Module | None, ours: nn.Sequential, *, raised: float = 0.0) -> None:
    """Copy an MLP; `last`: their last layer where it stands apart. raised: by what the last biases are raised, where
    theirs ends with ReLU."""
    linears = [layer for layer in ours if isinstance(layer, nn.Linear)]
    linears[-1].bias.data.add_(raised)
    layers = [*(theirs.linears if theirs is not None else []), *([last] if last is not None else [])]
    for one, other in zip(layers, linears, strict=True):
        copy_linear(one, other)


def features(inputs):
    return [inputs.DenseFeat(f"x{i}", 1) for i in range(COLUMNS)]


def test_mmoe_is_that_of_deepctr_torch(peer):
    models, inputs = peer("deepctr_torch.models"), peer("deepctr_torch.inputs")
    tower = make("mmoe", dense_fields(["click", "like"]), experts=3, expert=[6, 5], gate=[4], head=[3])
    model = models.MMOE(features(inputs), 3, (6, 5), (4,), (3,))
    for theirs, ours in zip(model.expert_dnn, tower.experts.nets, strict=True):
        copy_dnn(theirs, None, ours, raised=50.0)
    for task in range(2):
        copy_dnn(model.gate_dnn[task], model.gate_dnn_final_layer[task], tower.gate[task].mlp)
        for layer in (0, -1):  # so that probabilities are none of 0 and 1
            tower.heads.nets[task][layer].weight.data.mul_(0.05)
        copy_dnn(model.tower_dnn[task], model.tower_dnn_final_layer[task], tower.heads.nets[task])
    logits, found = given_to(model, tower)
    torch.testing.assert_close(torch.sigmoid(logits), found, rtol=1e-4, atol=1e-6)


def test_ple_is_that_of_deepctr_torch(peer):
    models, inputs = peer("deepctr_torch.models"), peer("deepctr_torch.inputs")
    sizes = {"layers": 2, "own": 2, "shared": 2, "expert": [6, 5], "gate": [4], "head": [3], "shared_gate": "all"}
    tower = make("ple", dense_fields(["click", "like"]), **sizes)
    model = models.PLE(features(inputs), 2, 2, 2, (6, 5), (4,), (3,))
    for level, layer in enumerate(tower.extraction):
        for task in range(2):
            for theirs, ours in zip(model.specific_experts[level][task], layer.own[task], strict=True):
                copy_dnn(theirs, None, ours, raised=(20.0, 200.0)[level])
            last = model.specific_gate_dnn_final_layer[level][task]
            copy_dnn(model.specific_gate_dnn[level][task][0], last, layer.gates[task].mlp)
        for theirs, ours in zip(model.shared_experts[level][0], layer.shared, strict=True):
            copy_dnn(theirs, None, ours, raised=(20.0, 200.0)[level])
        if layer.shared_gate is not None:
            last = model.shared_gate_dnn_final_layer[level]
            copy_dnn(model.shared_gate_dnn[level], last, layer.shared_gate.mlp)
    for task in range(2):
        for layer in (0, -1):  # so that probabilities are none of 0 and 1
            tower.heads.nets[task][layer].weight.data.mul_(0.05)
        copy_dnn(model.tower_dnn[task], model.tower_dnn_final_layer[task], tower.heads.nets[task])
    logits, found = given_to(model, tower)
    torch.testing.assert_close(torch.sigmoid(logits), found, rtol=1e-4, atol=1e-6)


def test_esmm_is_that_of_deepctr_torch(peer):
    models, inputs = peer("deepctr_torch.models"), peer("deepctr_torch.inputs")
    fields = dense_fields(["click", {"name": "buy", "where": "click"}])
    tower, model = make("esmm", fields, hidden=[6, 5]), models.ESMM(features(inputs), (6, 5))
    copy_dnn(model.ctr_dnn, model.ctr_dnn_final_layer, tower.nets[0])
    copy_dnn(model.cvr_dnn, model.cvr_dnn_final_layer, tower.nets[1])
    logits, found = given_to(model, tower)
    ours = torch.sigmoid(torch.stack([logits[:, 0], joint_logit(fields.labels, 1, logits)], 1))
    torch.testing.assert_close(ours, found, rtol=1e-4, atol=1e-6)


def test_both_units_of_dien_and_its_next_events_are_those_of_deepctr_torch(peer):
    from tessera.ctr.models.dien import DIEN

    theirs_of, dim, length = peer("deepctr_torch.models.dien"), 4, 5
    torch.manual_seed(3)
    ids, group = ("item", "other"), SequenceGroup("h", ("items", "others"), (), (0, None), length)
    fields = Fields((), ids, Raw, sequences=(group,))
    ours = DIEN(fields, dim, [3], [6, 3], {"items": "others"}, 1.0, [100, 50], 0.0, batch_norm=False)
    extractor = theirs_of.InterestExtractor(dim, use_neg=True, init_std=0.3)
    of_evolution = {"att_hidden_size": (6, 3), "att_activation": "sigmoid", "att_weight_normalization": True}
    evolution = theirs_of.InterestEvolving(dim, "AUGRU", use_neg=True, init_std=0.3, **of_evolution)
    with torch.no_grad():
        for parameter in (*extractor.parameters(), *evolution.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 0.4)
        copy_unit(ours.extractor, extractor.gru, "_l0", turned=True)
        copy_unit(ours.evolution, evolution.interest_evolution.rnn, "", turned=False)
        pairs = [(ours.next_event, extractor.auxiliary_net), (ours.score, evolution.attention)]
        for mine, other in pairs:
            both = ([one for one in side.modules() if isinstance(one, nn.Linear)] for side in (mine, other))
            for one, two in zip(*both, strict=True):
                one.weight.copy_(two.weight)
                if one.bias is not None:  # the last one of scores, which a softmax follows
                    one.bias.copy_(two.bias)
    lengths = torch.tensor([2, 5, 3, 4])
    e, n = torch.randn(2, 4, length, dim)
    query, there = torch.randn(4, dim), torch.arange(length) < lengths[:, None]
    interests, loss = extractor(e, lengths, n)
    h = ours.extractor(e, there)
    torch.testing.assert_close(h[there], interests[there], rtol=1e-4, atol=1e-6)
    # Their mean is over all events and both answers, ours over a row's.
    own = ours._next_events(h, e, n, there) * (lengths - 1)
    torch.testing.assert_close(own.sum() / (2 * (lengths - 1).sum()), loss, rtol=1e-4, atol=1e-6)
    q = query[:, None].expand_as(h)
    a = ours.score(torch.cat([q, h, q - h, q * h], 2)).squeeze(2).masked_fill(~there, -torch.inf).softmax(1)
    torch.testing.assert_close(
        ours.evolution(h, there, a)[:, -1], evolution(query, interests, lengths), rtol=1e-4, atol=1e-6
    )


def copy_unit(unit, theirs, suffix: str, *, turned: bool) -> None:
    """Their rows are (reset, update, new) and torch's update gate is 1 - ours; they have a second bias, 0 for `new`."""
    size = unit.of_input.weight.shape[1]
    sign = torch.ones(3 * size, 1)
    sign[:size] = -1.0 if turned else 1.0
    order = [*range(size, 2 * size), *range(size), *range(2 * size, 3 * size)]
    getattr(theirs, f"bias_hh{suffix}")[2 * size :] = 0
    for name, target in (("ih", unit.of_input), ("hh", unit.of_state)):
        target.weight.copy_(getattr(theirs, f"weight_{name}{suffix}")[order] * sign)
    bias = getattr(theirs, f"bias_ih{suffix}") + getattr(theirs, f"bias_hh{suffix}")
    unit.of_input.bias.copy_(bias[order] * sign[:, 0])


@pytest.mark.parametrize("softmax", [False, True])
def test_the_attention_of_din_is_that_of_deepctr_torch(peer, softmax):
    from tessera.ctr.models.din import TargetAttention

    layer = peer("deepctr_torch.layers.sequence").AttentionSequencePoolingLayer
    torch.manual_seed(0)
    lengths, dim = [1, 6, 3], 4
    ours = TargetAttention(SequenceGroup("h", ("items",), (), (0,), 6), dim, [5, 3], softmax=softmax).eval()
    theirs = layer((5, 3), "Dice", weight_normalization=softmax, embedding_dim=dim).eval()
    copy_dnn(theirs.local_att.dnn, theirs.local_att.dense, ours.score)
    for dice, other in zip((one for one in ours.score if isinstance(one, Dice)),
                           theirs.local_att.dnn.activation_layers, strict=True):  # fmt: skip
        torch.nn.init.normal_(dice.alpha)
        other.alpha.data.copy_(dice.alpha.view_as(other.alpha))
        for mine, his in (
            (dice.norm.running_mean, other.bn.running_mean),
            (dice.norm.running_var, other.bn.running_var),
        ):
            his.copy_(mine.uniform_(0.5, 1.5))
    query, keys = torch.randn(3, 1, dim), torch.randn(3, 6, dim)
    events = torch.cat([one[:length] for one, length in zip(keys, lengths, strict=True)])
    of = Events(torch.tensor([0, *lengths]).cumsum(0), {"v": {"items": events}}, {})
    found = theirs(query, keys, torch.tensor(lengths)[:, None])[:, 0]
    torch.testing.assert_close(ours(query, of), found, rtol=1e-4, atol=1e-6)


def test_the_attention_of_hstu_is_that_of_its_authors(peer):
    """With several targets each; the authors' padded form needs every row as long as n_max at most."""
    peer_mha = peer("generative_recommenders.ops.pytorch.pt_hstu_attention").pytorch_hstu_mha
    import fbgemm_gpu  # noqa: F401, whose operators it calls

    torch.manual_seed(0)
    offsets = torch.tensor([0, 5, 14, 16, 36])
    q, k, v = (torch.randn(36, 2, width, requires_grad=True) for width in (4, 4, 3))
    for targets in (1, 2):
        ours = HSTUAttention(offsets, 0, targets, 20, 20.0)(q, k, v, 0.5)
        theirs = peer_mha(20, 0.5, q, k, v, offsets, num_targets=torch.full((4,), targets))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        pull = torch.randn_like(ours)
        for mine, his in zip(
            torch.autograd.grad(ours, (q, k, v), pull), torch.autograd.grad(theirs, (q, k, v), pull), strict=True
        ):
            torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)
