"""Models over several labels against their slow versions, in float64; what they are equal to, and what they refuse."""

from functools import cache

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tessera.ctr.config import load_config
from tessera.ctr.data.labels import labels_of
from tessera.ctr.data.schema import Schema
from tessera.ctr.instantiate import instantiate
from tessera.ctr.models.layers import FactorizationMachine
from tessera.ctr.models.numeric import ScaledVectors
from tessera.ctr.models.tower import Fields, Tower
from tessera.ctr.network import build_tower
from tessera.embedding.errors import ConfigError
from tests.ctr.models.names import OF_ONE_LABEL, OVER_LABELS
from tests.ctr.models.reference_labels import OVER_LABELS as SLOW

FUNNEL = ["click", {"name": "cart", "where": "click"}, {"name": "buy", "where": "cart"}]
APART = ["click", "like", "share"]
SMALL = {"bottom": [6, 5], "expert": [6, 5], "hidden": [6, 5], "head": [4], "gate": [3], "relation": [3]}
OWN = {"gnolr": {"user": ["I0", "C0", "C2"], "shares": [0.3, 0.1, 0.02], "slopes": [1.0, 1.2, 1.5]}}
DNN = {"target": "tessera.ctr.models.dnn.DNN", "hidden": [7], "dropout": 0.0, "batch_norm": False}
VARIANTS = [
    ("mmoe", {"experts": 1, "gate": []}),
    ("mmoe", {"body": DNN}),
    ("shared_bottom", {"body": DNN}),
    ("ple", {"layers": 3, "own": 2, "shared": 2}),
    ("ple", {"layers": 2, "shared_gate": "shared"}),
    ("ple", {"own": 0, "shared": 3}),
]


def fields_of(labels, numeric: int = 2, ids: int = 4) -> Fields:
    names = tuple(f"I{i}" for i in range(numeric)), tuple(f"C{i}" for i in range(ids))
    return Fields(*names, ScaledVectors, labels_of(labels), len(labels))


@cache
def yaml_of(model: str) -> DictConfig:
    return OmegaConf.create(load_config([f"model={model}"], "").model)


def make(model: str, fields: Fields, **changes):
    torch.manual_seed(5)
    config = OmegaConf.to_container(yaml_of(model))
    config |= {key: value for key, value in SMALL.items() if key in config} | OWN.get(model, {}) | changes
    config |= {"embedding_dim": 4} if model != "lr" else {}
    tower = instantiate(config, "model", fields).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return tower


def inputs(tower, fields: Fields, rows: int = 5):
    torch.manual_seed(6)
    numeric = torch.randn(rows, len(fields.numeric), dtype=torch.float64)
    shapes = {group: (rows, len(fields.ids), dim) for group, dim in tower.embedding_dims.items()}
    return numeric, {g: torch.randn(s, dtype=torch.float64, requires_grad=True) for g, s in shapes.items()}


@pytest.mark.parametrize(("model", "changes"), [(model, {}) for model in OVER_LABELS] + VARIANTS)
def test_logits_and_gradients(model, changes):
    fields = fields_of(FUNNEL if model in ("esmm", "gnolr") else APART)
    tower = make(model, fields, **changes)
    numeric, embeddings = inputs(tower, fields)
    fast, slow = tower(numeric, embeddings), SLOW[type(tower).__name__](tower, numeric, embeddings)
    assert fast.shape == (5, 3)
    torch.testing.assert_close(fast, slow, rtol=1e-6 if model == "gnolr" else 1e-9, atol=1e-9)
    wanted, pull = [*embeddings.values(), *tower.parameters()], torch.randn(5, 3, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(out, wanted, pull, allow_unused=True) for out in (fast, slow))
    # Of one expert the softmax is 1 whatever its gate says.
    assert all(one is not None for one in ours), "data parallel refuses parameters without a gradient"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("model", [name for name in OVER_LABELS if name not in ("esmm", "gnolr")])
def test_one_label_gives_a_vector(model):
    fields = fields_of(["click"])
    tower = make(model, fields)
    assert tower(*inputs(tower, fields)).shape == (5,)


def test_one_expert_is_a_shared_bottom_and_ple_without_own_experts_is_mmoe():
    fields = fields_of(APART)
    one, bottom = make("mmoe", fields, experts=1), make("shared_bottom", fields)
    bottom.bottom.load_state_dict(one.experts.state_dict())
    bottom.heads.load_state_dict(one.heads.state_dict())
    x = inputs(one, fields)
    torch.testing.assert_close(one(*x), bottom(*x), rtol=0, atol=1e-14)
    mmoe, ple = make("mmoe", fields, experts=3), make("ple", fields, own=0, shared=3)
    ple.embed.load_state_dict(mmoe.experts.embed.state_dict())
    ple.extraction[0].shared.load_state_dict(mmoe.experts.nets.state_dict())
    ple.extraction[0].gates.load_state_dict(mmoe.gate.state_dict())
    ple.heads.load_state_dict(mmoe.heads.state_dict())
    torch.testing.assert_close(mmoe(*x), ple(*x), rtol=0, atol=1e-14)


def test_gates_of_the_last_batch_are_known_by_label():
    fields = fields_of(APART)
    mmoe, ple = make("mmoe", fields), make("ple", fields, layers=2)
    numeric, embeddings = inputs(mmoe, fields)
    mmoe(numeric, embeddings)
    flat = mmoe.experts(numeric, embeddings)[1]
    share = torch.softmax(mmoe.gate[1].mlp(flat), 1).mean(0)
    assert list(mmoe.gates()) == APART and torch.allclose(mmoe.gates()["like"].double(), share.double(), atol=1e-6)
    ple(numeric, embeddings)
    assert list(ple.gates()) == [*(f"0.{name}" for name in APART), "0.shared", *(f"1.{name}" for name in APART)]
    assert all(abs(float(one.sum()) - 1) < 1e-6 for one in ple.gates().values())


def test_levels_of_gnolr_stay_apart_where_they_nearly_meet():
    """With slopes just below what is allowed and cosines of 1, q_1 - q_2 is about 1e-7, and gradients stay finite."""
    fields = fields_of(FUNNEL[:2])
    gap = torch.logit(torch.tensor(0.3)) - torch.logit(torch.tensor(0.1))
    tower = make("gnolr", fields, shares=[0.3, 0.1], slopes=[1.0, float(gap) - 1e-6])
    numeric, embeddings = inputs(tower, fields)
    with torch.no_grad():
        for nets in tower.nets:
            nets[1][-1].weight.zero_()  # both sides answer their bias: equal ones have a cosine of 1
            nets[1][-1].bias.fill_(1.0)
    logits = tower(numeric, embeddings)
    logits.sum().backward()
    assert logits.isfinite().all() and (logits[:, 1] > 10).all()
    assert embeddings["v"].grad.isfinite().all()


@pytest.mark.parametrize("model", ["esmm", "gnolr"])
@pytest.mark.parametrize(
    "labels", [["click"], ["click", "buy"], APART, [FUNNEL[0], FUNNEL[1], {"name": "buy", "where": "click"}]]
)
def test_labels_that_are_no_funnel_are_refused(model, labels):
    with pytest.raises(ConfigError, match=r"whose labels are a funnel, .*has click.*; expected labels of 0 and 1"):
        make(model, fields_of(labels))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"slopes": [1.0, 1.35, 1.0]}, r"model.slopes\[1\] is 1.35; .*less than 1.35, .*a probability can be negative"),
        ({"slopes": [0.0, 1.0, 1.0]}, r"model.slopes\[0\] is 0; expected more than 0$"),
        ({"slopes": [1.0, 1.0]}, "model.slopes has 2 numbers; expected one for each of 3 labels"),
        (
            {"shares": [0.1, 0.3, 0.02]},
            "model.shares is .*; expected the shares of rows that reach each level",
        ),
        ({"user": ["I0", "C9"]}, "model.user names 'C9', which is no feature"),
        ({"user": []}, "model.user has 0 of 6 features; expected"),
    ],
)
def test_settings_of_gnolr_that_cannot_be_are_refused(changes, line):
    with pytest.raises(ConfigError, match=line):
        make("gnolr", fields_of(FUNNEL), **changes)


QUICK = ("deepfm", "fgcnn", "final_mlp", "xdeepfm")
CLASSIFIER = {**DNN, "target": "tessera.ctr.models.wide_deep.WideDeep"}
HEADED = [(model, {"kernel": 3, "classifier": CLASSIFIER} if model == "fgcnn" else {}) for model in OF_ONE_LABEL]
HEADED += [("fwfm", {"linear_part": "FeLV"}), ("fwfm", {"linear_part": "LW"}), ("final_mlp", {"heads": 2})]
HEADED += [("autoint", {"wide": True})]
WIDTHS = {"hidden1": [6, 4], "hidden2": [4, 6], "maps": [3, 2], "channels": [2, 3], "subnet": [3, 2], "bottom": [5]}
OF_OUTPUTS = ("fm.weight", "output.weight")  # which a model of one label does not have; 1 at first


def of_label(many: torch.Tensor, shape: torch.Size, number: int) -> torch.Tensor:
    """Return the part of a label: of the one axis that is T times as long as with one label."""
    if many.dim() > len(shape):
        return many[number]
    for axis, (long, short) in enumerate(zip(many.shape, shape, strict=True)):
        if long != short:
            return many.narrow(axis, number * short, short)
    return many


@pytest.mark.parametrize(
    ("model", "changes"), [pytest.param(*c, marks=[] if c[0] in QUICK else pytest.mark.slow) for c in HEADED]
)
def test_each_head_is_a_model_of_its_label_over_the_shared_body(model, changes):
    fields = fields_of(APART)
    changes = {key: value for key, value in WIDTHS.items() if key in yaml_of(model)} | changes
    many, one = make(model, fields, **changes), make(model, fields_of(["click"]), **changes)
    of_all = dict(many.named_parameters())
    extra = of_all.keys() - dict(one.named_parameters()).keys()
    assert all(name.endswith(OF_OUTPUTS) for name in extra)
    numeric, embeddings = inputs(many, fields)
    with torch.no_grad():
        for name in extra:
            of_all[name].fill_(1.0)
        logits = many(numeric, embeddings)
        assert logits.shape == (5, 3)
        for number in range(3):
            for name, parameter in one.named_parameters():
                parameter.copy_(of_label(of_all[name], parameter.shape, number))
            dims = {group: torch.Size((5, 4, dim)) for group, dim in one.embedding_dims.items()}
            own = {group: of_label(rows, dims[group], number) for group, rows in embeddings.items()}
            torch.testing.assert_close(logits[:, number], one(numeric, own))


def test_labels_weigh_the_coordinates_of_a_factorization_machine():
    torch.manual_seed(0)
    fm, e = FactorizationMachine(4, 2).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(fm(e), FactorizationMachine(4, 1)(e)[:, None].expand(3, 2))
    torch.nn.init.normal_(fm.weight)
    pairs = sum(e[:, i] * e[:, j] for i in range(5) for j in range(i))
    torch.testing.assert_close(fm(e), pairs @ fm.weight.T)


class OneLogit(Tower):
    """A model of somebody's own, from before there were several labels."""

    def __init__(self, fields: Fields, embedding_dim: int = 4) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim}


def test_a_model_of_one_logit_is_refused():
    config = load_config(["model=lr", "data.schema.features=[{name: a}]", "data.schema.time=null"], "")
    config.model = {"target": f"{__name__}.OneLogit"}
    config.data.schema.labels = APART
    with pytest.raises(ConfigError, match="answers one label, and data.schema.labels has click, like, share; exp"):
        build_tower(config, Schema(config.data.schema))
    with pytest.raises(ConfigError, match="model.body.target is .*OneLogit, which answers one logit and cannot"):
        make("mmoe", fields_of(APART), body={"target": f"{__name__}.OneLogit"})
    fcn = OmegaConf.to_container(yaml_of("fcn")) | {"embedding_dim": 4}
    with pytest.raises(ConfigError, match="FCN, whose parts have losses to the labels and which cannot be a part"):
        make("mmoe", fields_of(APART), body=fcn)
