"""Each model against its slow version: logits and all gradients, in float64."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tessera.ctr.config import load_config
from tessera.ctr.instantiate import instantiate
from tessera.ctr.models.numeric import AutoDis, Bucketised, Raw, ScaledVectors
from tessera.ctr.models.tower import Fields
from tests.ctr.models.names import MORE, quick
from tests.ctr.models.names import OF_ONE_LABEL as MODELS
from tests.ctr.models.reference_crosses import BY_CLASS

ROWS, DIM = 5, 4
NUMERIC = {
    "scaled": partial(ScaledVectors, init_std=0.5),
    "autodis": partial(AutoDis, buckets=3, temperature=0.7, skip=0.1, slope=0.01, init_std=0.5),
    "bucketised": partial(Bucketised, buckets=4, low=-1.0, high=1.0, init_std=0.5),
    "raw": Raw,
}
SMALL = {
    "hidden": [6, 5],
    "hidden1": [6, 4],
    "hidden2": [4, 6],
    "embedding_dim": DIM,
    "attention_dim": 6,
    "maps": [3, 2],
    "channels": [2, 3],
    "subnet": [3, 2],
    "bottom": [5],
    "products": 4,
    "pair_dim": 3,
    "deep_hidden": [6],
    "fm_hidden": [5],
    "fm_vectors": 2,
    "linear_vectors": 2,
    "rank": 2,
    "tokens": 3,
    "width": 6,
    "expansion": 2,
    "block_width": 5,
}
VARIANTS = {
    "kpnn": [{"kernel": "mat"}, {"kernel": "vec"}, {"kernel": "num"}],
    "autoint": [
        {"residual": "identity", "layer_norm": "before_relu", "scale": True, "wide": True, "layers": 2},
        {"form": "code"},
        {"residual": False},
        {"form": "code", "residual": False, "heads": 1},
    ],
    "dcn_v2": [{"structure": "stacked"}, {"low_rank": 2}],
    "final_mlp": [{"heads": 2}, {"gate1_fields": ["C0"], "gate2_fields": ["C1", "C0"], "gate_hidden": [3]}],
    "fgcnn": [
        {"conv_batch_norm": True, "kernel": 3},
        {"pool": 3, "recombined": 1},
        {"pool": 1},
        {"pool_padding": "both"},
    ],
    "dnn": [{"batch_norm": True}],
    "dcn": [{"hidden": []}],
    "gdcn": [{"structure": "stacked"}],
    "fwfm": [{"linear_part": "FeLV"}, {"linear_part": "LW"}],
    "fmfm": [{"kernel": "vec"}],
    "optinter": [{"pair_dim": None}],
    "mask_net": [
        {"structure": "parallel", "blocks": 2},
        {"norm_embeddings": False, "norm_blocks": False, "mask_ratio": 0.3},
    ],
    "wukong": [{"linear_vectors": 0, "layers": 1}, {"batch_norm": True}],
    "fibinet": [{"bilinear": "all", "reduction": 1}, {"bilinear": "each"}],
    "ecn": [{"heads": 2, "batch_norm": True}, {"layer_norm": False, "embedding_dim": 3}],
    "fcn": [{"heads": 2}],
    "final_net": [{"residual": "sum", "hidden1": [3]}, {"gate": False, "relu": False}, {"hidden2": []}],
    "afn": [{"batch_norm": False}],
    "rank_mixer": [{"tokens": 1, "layers": 1}, {"hidden": [5], "tokens": 2}],
    "edcn": [{"bridge": "sum", "batch_norm": True}, {"bridge": "concat", "temperature": 3.0}],
}
CASES = [(model, {}) for model in MODELS] + [(model, change) for model in VARIANTS for change in VARIANTS[model]]
SHAPES = [(2, 3), (0, 5), (5, 0), (1, 1)]  # numeric and id fields


def cases() -> list[Any]:
    """Every case with every shape; of MORE the first of each alone is not slow."""
    found = []
    for shape in SHAPES:
        for model, changes in CASES:
            slow = model in MORE and (changes or shape != SHAPES[0])
            found.append(pytest.param(model, changes, *shape, marks=[pytest.mark.slow] if slow else []))
    return found


@cache
def yaml_of(model: str) -> DictConfig:
    return OmegaConf.create(load_config([f"model={model}"], "").model)


def make(model: str, fields: Fields, **changes):
    """A tower with the model's own yaml, small widths, and parameters far from zero, in float64."""
    torch.manual_seed(3)
    config = OmegaConf.to_container(yaml_of(model))
    for key in config:
        if key in SMALL and config[key] != []:
            config[key] = SMALL[key]
    if model == "fgcnn":
        config["classifier"].update(hidden=SMALL["hidden"])
        config["kernel"] = min(config["kernel"], 1 if len(fields) < 3 else 3)
    tower = instantiate({**config, **changes}, "model", fields).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return tower


def named(numeric: int, ids: int, kind: str = "scaled") -> Fields:
    return Fields(tuple(f"I{i}" for i in range(numeric)), tuple(f"C{i}" for i in range(ids)), NUMERIC[kind])


def inputs(tower, fields: Fields, rows: int):
    torch.manual_seed(4)
    numeric = torch.randn(rows, len(fields.numeric), dtype=torch.float64)
    shapes = {group: (rows, len(fields.ids), dim) for group, dim in tower.embedding_dims.items()}
    return numeric, {g: torch.randn(s, dtype=torch.float64, requires_grad=True) for g, s in shapes.items()}


def check(tower, fields: Fields, rows: int = ROWS) -> None:
    numeric, embeddings = inputs(tower, fields, rows)
    slow = BY_CLASS[type(tower).__name__](tower, numeric, embeddings)
    fast = tower(numeric, embeddings)
    assert fast.shape == (rows,)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)
    wanted = [emb for emb in embeddings.values() if emb.numel()] + [p for p in tower.parameters() if p.numel()]
    pull = torch.randn(rows, dtype=torch.float64)
    gradients = [torch.autograd.grad(out, wanted, pull, allow_unused=True) for out in (fast, slow)]
    for ours, theirs, tensor in zip(*gradients, wanted, strict=True):
        zero = torch.zeros_like(tensor)
        ours, theirs = (zero if grad is None else grad for grad in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("model", "changes", "numeric", "ids"), cases())
def test_forward_and_gradients(model, changes, numeric, ids):
    fields = named(numeric, ids)
    if "gate1_fields" in changes and ids < 2:
        changes = {**changes, "gate1_fields": ["I0"], "gate2_fields": ["I0"]}
    if model == "fgcnn" and changes.get("kernel") == 3 and numeric + ids < 3:
        changes = {**changes, "kernel": 1}
    check(make(model, fields, **changes), fields)


WIDE = [m for m in MODELS if m not in ("fgcnn", "xdeepfm")]


@pytest.mark.parametrize(  # AutoInt's formulas are plain loops, over all pairs of 60 fields
    "model", [pytest.param(m, marks=pytest.mark.slow) if m.startswith("autoint") or m in MORE else m for m in WIDE]
)
def test_60_fields(model):
    fields = named(20, 40)
    one_layer = {"layers": 1, "heads": 1} if model.startswith("autoint") else {}
    check(make(model, fields, **one_layer), fields, rows=1 if one_layer else 3)


@pytest.mark.parametrize(("model", "changes"), [("fgcnn", {"kernel": 9}), ("xdeepfm", {"maps": [2]})])
def test_60_fields_in_slow_formulas(model, changes):
    fields = named(20, 40)
    tower = make(model, fields, **changes)
    if model == "fgcnn":
        assert tower.generate.count == 2 * (30 + 15)
    check(tower, fields, rows=3)


@pytest.mark.parametrize("kind", ["autodis", "bucketised", "raw"])
@pytest.mark.parametrize("model", quick(MODELS))
def test_every_numeric_embedding(model, kind):
    fields = named(3, 4, kind)
    check(make(model, fields), fields)


@pytest.mark.parametrize("model", ["dnn", "lr", "wide_deep", "final_mlp"])
def test_raw_values_alone(model):
    fields = named(3, 0, "raw")
    check(make(model, fields), fields)


@pytest.mark.parametrize("classifier", quick([m for m in MODELS if m not in ("fgcnn", "lr", "afn_plus", "optinter")]))
def test_fgcnn_before_any_classifier(classifier):
    fields = named(2, 4)
    config = OmegaConf.to_container(yaml_of(classifier))
    config.update({key: value for key, value in SMALL.items() if key in config and config[key] != []})
    check(make("fgcnn", fields, classifier=config), fields)
