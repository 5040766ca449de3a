"""Towers weight for weight against public implementations, where a folder of them is at hand.

TESSERA_PEERS names a folder on which `fuxictr` can be imported, with the models of its repository in `zoo/model_zoo`
and those of salmon1802/FCN in `zoo/FCN`; without it these tests are skipped.
"""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import DenseArch, InteractionArch, OverArch

from tessera.ctr.models.layers import MLP
from tests.ctr.models.test_towers import make, named

PEERS = Path(os.environ.get("TESSERA_PEERS", "/nowhere"))
needs_peers = pytest.mark.skipif(not (PEERS / "fuxictr").is_dir(), reason="TESSERA_PEERS names no folder with fuxictr")
FIELDS, DIM, ROWS, IDS = 4, 4, 7, 9


def peer(path: str, name: str, **settings: Any) -> nn.Module:
    """A model of FuxiCTR over id fields alone, its parameters far from zero, in float64 and training."""
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    from fuxictr.features import FeatureMap

    map_ = FeatureMap("none", "/tmp")
    one = {"source": "", "type": "categorical", "vocab_size": IDS, "padding_idx": None}
    map_.features = {f"C{i}": dict(one) for i in range(FIELDS)}
    map_.num_fields, map_.total_features, map_.labels = FIELDS, FIELDS * IDS, ["label"]
    map_.default_emb_dim = DIM
    spec = importlib.util.spec_from_file_location(f"peer_{name}", PEERS / "zoo" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logging.disable(logging.CRITICAL)
    fixed = {"optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["AUC"], "verbose": 0, "model_root": "/tmp"}
    made = getattr(module, name)(map_, gpu=-1, embedding_dim=DIM, **fixed, **settings).double()
    logging.disable(logging.NOTSET)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return made.train()


def vectors_of(layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[B, F, dim] of a peer's tables, those of the two library's layers that wrap each other."""
    inner = layer
    while not hasattr(inner, "embedding_layers"):
        inner = inner.embedding_layer
    return torch.stack([inner.embedding_layers[f"C{i}"].weight[ids[:, i]] for i in range(FIELDS)], 1).detach()


def put(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    with torch.no_grad():
        ours.copy_(theirs.reshape(ours.shape))


LAYERS = (nn.Linear, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


def put_all(ours: nn.Module, theirs: nn.Module) -> None:
    """Linear layers and norms in their order, each with weight and bias."""
    mine, others = ([one for one in side.modules() if isinstance(one, LAYERS)] for side in (ours, theirs))
    assert len(mine) == len(others), (mine, others)
    for one, other in zip(mine, others, strict=True):
        put(one.weight, other.weight)
        assert one.bias is not None or other.bias is None or isinstance(ours, MLP)
        if one.bias is not None:
            put(one.bias, other.bias)


def dcn(t, p):
    for one, other in zip(t.cross, p.crossnet.cross_net, strict=True):
        put(one.weight.weight, other.weight.weight)
        put(one.bias, other.bias)
    put_all(t.mlp, p.dnn)
    put_all(t.output, p.fc)


def gdcn(t, p):
    for number, one in enumerate(t.cross):
        put(one.weight.weight, p.cross_net.w[number].weight)
        put(one.weight.bias, p.cross_net.b[number])
        put(one.gate.weight, p.cross_net.wg[number].weight)
    if t.parallel:
        put_all(t.mlp, p.dnn)
        put_all(t.output, p.fc)
    else:
        put_all(nn.Sequential(t.mlp, t.output), p.dnn)


def fwfm(t, p):
    put_all(t.pairs, p.interaction_weight)
    if t.part == "FiLV":
        put_all(t.of_fields, p.linear_weight_layer)


def fmfm(t, p):
    put(t.products.kernel, p.interaction_weight)
    put(t.first_order.bias, p.lr_layer.bias)


def edcn(t, p):
    """The peer's cross layers leave out DCN's residual, the layer's own input; it is put back."""
    for number, one in enumerate(t.cross):
        plain = p.cross_layers[number].forward
        p.cross_layers[number].forward = lambda first, state, plain=plain: plain(first, state) + state
        put(one.weight.weight, p.cross_layers[number].weight.weight)
        put(one.bias, p.cross_layers[number].bias)
        put_all(t.deep[number], p.dense_layers[number])
        regulation = p.regulation_modules[number]
        put(t.regulate[number].scores, torch.stack([regulation.g1, regulation.g2]))
        put_all(t.regulate[number].norms, regulation)
    if t.join is not None:
        put_all(t.join, p.bridge_modules)
    put_all(t.output, p.fc)


def dlrm(t, p):
    put_all(t.mlp, p.top_mlp)


def mask_net(t, p):
    put(t.norm.scale, torch.stack([one.weight for one in p.emb_norm]))
    put(t.norm.shift, torch.stack([one.bias for one in p.emb_norm]))
    for one, other in zip(t.blocks, p.mask_net.mask_blocks, strict=True):
        put_all(one, other)
    put_all(t.mlp, p.mask_net.fc if t.serial else p.mask_net.dnn)


def wukong(t, p):
    for one, other in zip(t.layers, p.wukong_stack, strict=True):
        put(one.project, other.fmb.proj_Y)
        put_all(one.fm_norm, other.fmb.layer_norm)
        put_all(one.fm_mlp, other.fmb.mlp)
        put_all(one.compress, other.lcb.linear)
        put_all(one.norm, other.layer_norm)
        if isinstance(one.residual, nn.Linear):
            put_all(one.residual, other.residual_proj)
    put_all(t.mlp, p.fc)


def fibinet(t, p):
    put_all(t.weigh, p.senet_layer)
    put(t.plain.weight, p.bilinear_interaction1.bilinear_W)
    put(t.weighed.weight, p.bilinear_interaction2.bilinear_W)
    put(t.first_order.bias, torch.zeros(()))
    put_all(t.mlp, p.dnn)


def afn(t, p):
    put_all(t.log_norm, p.log_batch_norm)
    put_all(t.exp_norm, p.exp_batch_norm)
    put_all(t.orders, p.coefficient_W)
    put_all(t.mlp, p.dense_layer)
    if t.is_plus:
        put_all(t.deep, p.dnn)
        put_all(t.join, p.fc)


def final_net(t, p):
    if t.gate is not None:
        put_all(t.gate, p.feature_gating.linear)
    for ours, output, block, fc in (
        (t.first, t.first_output, p.block1, p.fc1),
        (t.second, t.second_output, getattr(p, "block2", None), getattr(p, "fc2", None)),
    ):
        if ours is None:
            continue
        for mine, theirs in (("FactorizedInteraction", block.layer), ("BatchNorm", block.norm)):
            own = [one for one in ours if type(one).__name__ == mine]
            for one, other in zip(own, theirs, strict=True):
                put_all(one, other)
        put_all(output, fc)


def stack(ours, theirs):
    for number, one in enumerate(ours.layers):
        put(one.weight.weight, theirs.w[number].weight)
        put(one.bias, theirs.b[number])
        put_all(one.batch_norm, theirs.batch_norm[number] if len(theirs.batch_norm) else nn.Identity())
        put_all(one.layer_norm, theirs.layer_norm[number])


def ecn(t, p):
    stack(t.cross, p.ECN)
    put_all(t.output, p.ECN.fc)


def fcn(t, p):
    stack(t.deep, p.ECN)
    stack(t.shallow, p.LCN)
    put_all(t.deep_output, p.ECN.dfc)
    put_all(t.shallow_output, p.LCN.sfc)


def autoint(t, p):
    for one, other in zip(t.interact, p.self_attention, strict=True):
        parts = [other.W_q, other.W_k, other.W_v] + ([other.W_res] if other.W_res is not None else [])
        put(one.project.weight, torch.cat([part.weight for part in parts]))
        if not isinstance(one.norm, nn.Identity):
            put_all(one.norm, other.layer_norm)
    put_all(t.output, p.fc)
    if t.mlp is not None:
        put_all(t.mlp, p.dnn)
    if t.first_order is not None:
        put(t.first_order.bias, torch.zeros(()))


ZOO = "model_zoo/{0}/src/{0}.py"
H = [6, 5]
#: model, its changes, the peer's file, class and settings, and what copies its weights.
CASES: list[tuple[str, dict[str, Any], str, str, dict[str, Any], Callable]] = [
    ("dcn", {}, "model_zoo/DCN/DCN_torch/src/DCN.py", "DCN", {"dnn_hidden_units": H}, dcn),
    ("gdcn", {}, ZOO.format("GDCN"), "GDCNP", {"dnn_hidden_units": H}, gdcn),
    ("gdcn", {"structure": "stacked"}, ZOO.format("GDCN"), "GDCN", {"dnn_hidden_units": H}, gdcn),
    ("fwfm", {}, ZOO.format("FwFM"), "FwFM", {}, fwfm),
    ("fwfm", {"linear_part": "FeLV"}, ZOO.format("FwFM"), "FwFM", {"linear_type": "FeLV"}, fwfm),
    ("fmfm", {}, ZOO.format("FmFM"), "FmFM", {}, fmfm),
    ("edcn", {"temperature": 2.0}, ZOO.format("EDCN"), "EDCN", {"temperature": 2.0}, edcn),
    (
        "edcn",
        {"bridge": "sum", "batch_norm": True},
        ZOO.format("EDCN"),
        "EDCN",
        {"bridge_type": "pointwise_addition", "batch_norm": True},
        edcn,
    ),
    ("edcn", {"bridge": "concat"}, ZOO.format("EDCN"), "EDCN", {"bridge_type": "concatenation"}, edcn),
    ("dlrm", {}, ZOO.format("DLRM"), "DLRM", {"top_mlp_units": H}, dlrm),
    ("mask_net", {}, ZOO.format("MaskNet"), "MaskNet", {"dnn_hidden_units": H}, mask_net),
    (
        "mask_net",
        {"structure": "parallel", "blocks": 2},
        ZOO.format("MaskNet"),
        "MaskNet",
        {
            "dnn_hidden_units": H,
            "model_type": "ParallelMaskNet",
            "parallel_num_blocks": 2,
            "parallel_block_dim": 5,
        },
        mask_net,
    ),
    (
        "wukong",
        {},
        ZOO.format("WuKong"),
        "WuKong",
        {
            "lcb_features": 2,
            "fmb_features": 2,
            "fmb_mlp_units": [5],
            "fmp_rank_k": 2,
            "mlp_hidden_units": H,
            "mlp_batch_norm": False,
        },
        wukong,
    ),
    *(
        (
            "fibinet",
            {"bilinear": kind},
            ZOO.format("FiBiNET"),
            "FiBiNET",
            {"hidden_units": H, "bilinear_type": f"field_{kind}"},
            fibinet,
        )
        for kind in ("all", "each", "interaction")
    ),
    (
        "afn",
        {"batch_norm": False},
        ZOO.format("AFN"),
        "AFN",
        {"ensemble_dnn": False, "afn_hidden_units": H, "logarithmic_neurons": 4, "batch_norm": False},
        afn,
    ),
    (
        "afn_plus",
        {"batch_norm": False},
        ZOO.format("AFN"),
        "AFN",
        {"afn_hidden_units": H, "dnn_hidden_units": [6], "logarithmic_neurons": 4, "batch_norm": False},
        afn,
    ),
    *(
        (
            "final_net",
            {"residual": residual, "batch_norm": norm, **({"hidden2": []} if kind == "1B" else {})},
            ZOO.format("FinalNet"),
            "FinalNet",
            {
                "block_type": kind,
                "residual_type": residual,
                "batch_norm": norm,
                "use_feature_gating": True,
                "block1_hidden_units": [6, 4],
                "block2_hidden_units": [4, 6],
                "block1_hidden_activations": "ReLU",
                "block2_hidden_activations": "ReLU",
            },
            final_net,
        )
        for kind, residual, norm in (("2B", "concat", True), ("2B", "sum", False), ("1B", "concat", True))
    ),
    ("ecn", {"layers": 3}, "FCN/src/ECN.py", "ECN", {}, ecn),
    (
        "ecn",
        {"layers": 3, "heads": 2, "batch_norm": True},
        "FCN/src/ECN.py",
        "ECN",
        {"num_heads": 2, "batch_norm": True},
        ecn,
    ),
    (
        "fcn",
        {"heads": 2},
        "FCN/src/DCNv3.py",
        "DCNv3",
        {
            "num_deep_cross_layers": 3,
            "num_shallow_cross_layers": 4,
            "num_heads": 2,
            "deep_net_dropout": 0,
            "shallow_net_dropout": 0,
        },
        fcn,
    ),
    (
        "autoint_plus",
        {"residual": "identity", "layer_norm": "before_relu", "scale": True, "wide": True, "layers": 2, "heads": 2},
        ZOO.format("AutoInt"),
        "AutoInt",
        {
            "attention_layers": 2,
            "num_heads": 2,
            "attention_dim": 6,
            "dnn_hidden_units": H,
            "use_wide": True,
            "use_residual": True,
            "use_scale": True,
            "layer_norm": True,
        },
        autoint,
    ),
]


def embeddings_of(ours: nn.Module, theirs: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"v": vectors_of(theirs.embedding_layer, ids)}
    for group, names in {
        "w": ("lr_layer",),
        "deep": ("embedding_layer2",),
        "u": ("linear_weight_layer",),
    }.items():
        if group in ours.embedding_dims:
            found[group] = vectors_of(getattr(theirs, names[0]), ids)
    return found


@needs_peers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes", "path", "name", "settings", "copy"),
    CASES,
    ids=[f"{one[3]}-{i}" for i, one in enumerate(CASES)],
)
def test_logits_are_the_peers(model, changes, path, name, settings, copy):
    theirs = peer(path, name, **settings)
    ours = make(model, named(0, FIELDS), **changes).train()
    copy(ours, theirs)
    ids = torch.randint(0, IDS, (ROWS, FIELDS), generator=torch.Generator().manual_seed(1))
    expected = theirs({f"C{i}": ids[:, i] for i in range(FIELDS)})["y_pred"][:, 0]
    found = torch.sigmoid(ours(torch.zeros(ROWS, 0).double(), embeddings_of(ours, theirs, ids)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_dlrm_is_torchrecs():
    """With numeric fields, whose vector comes first."""
    torch.manual_seed(2)
    dense, over = DenseArch(2, [5, DIM]).double(), OverArch(DIM + 6, [6, 5, 1]).double()
    ours = make("dlrm", named(2, 3, "raw"))
    put_all(ours.bottom, dense)
    put_all(ours.mlp, over)
    numeric, emb = torch.randn(ROWS, 2).double(), torch.randn(ROWS, 3, DIM).double()
    expected = over(InteractionArch(3)(dense(numeric), emb)).squeeze(1)
    torch.testing.assert_close(ours(numeric, {"v": emb}), expected)
