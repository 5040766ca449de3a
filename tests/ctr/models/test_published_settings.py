"""The keys by which published runs are repeated: what they compute, and that the experiments have them."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tessera.ctr.models.numeric import ScaledVectors
from tessera.embedding.errors import ConfigError

EXPERIMENTS = Path(__file__).resolve().parents[3] / "conf/experiment"
#: Of the runs' logs: layer norm, scale, linear part, dropout of attention, residual.
AUTOINT = {
    "criteo_x1_autoint_plus": (True, False, True, 0.1, True),
    "avazu_x1_autoint_plus": (True, True, False, 0.1, True),
    "frappe_x1_autoint_plus": (True, True, False, 0.1, True),
    "movielenslatest_x1_autoint_plus": (True, True, True, 0.1, True),
    "criteo_x4_autoint_plus": (False, False, True, 0.0, True),
    "avazu_x4_autoint": (False, False, True, 0.0, False),
}


@pytest.mark.parametrize("name", AUTOINT)
def test_autoint_is_the_published_one(name):
    model = OmegaConf.load(EXPERIMENTS / f"{name}.yaml").model
    found = (
        model.get("layer_norm") == "before_relu",
        model.get("scale", False),
        model.get("wide", False),
        model.get("attention_dropout", 0.0),
        model.get("residual", True) == "identity",
    )
    assert found == AUTOINT[name]


def test_x4_stops_by_auc_less_logloss():
    for path in EXPERIMENTS.glob("*_x4_*.yaml"):
        metric = OmegaConf.load(path).trainer.early_stop.metric
        others = {"criteo_x4_dcn_v2": "auc", "criteo_x4_autoint": "logloss"}
        assert metric == others.get(path.stem, "auc-logloss"), path.name


def test_numeric_vectors_decay_as_a_whole():
    """Their gradient is that of l2 / 2 times the sum of squares beside the loss."""
    torch.manual_seed(0)
    vectors, x, pull = ScaledVectors(3, 4, l2=0.3).double(), torch.randn(5, 3).double(), torch.randn(5, 3, 4).double()
    (found,) = torch.autograd.grad((vectors(x) * pull).sum(), vectors.weight)
    loss = (x.unsqueeze(2) * vectors.weight * pull).sum() + 0.3 / 2 * vectors.weight.square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, vectors.weight)[0])


def test_numeric_vectors_begin_as_xaviers():
    torch.manual_seed(0)
    for dim in (1, 10):
        std = ScaledVectors(4000, dim, init_std=None).weight.std().item()
        assert std == pytest.approx((2 / (1 + dim)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("wrong", [{"l2": -1.0}, {"init_std": -0.1}])
def test_impossible_numbers_are_one_line(wrong):
    with pytest.raises(ConfigError, match="numeric.(l2|init_std) is -.*; expected"):
        ScaledVectors(2, 3, **wrong)
