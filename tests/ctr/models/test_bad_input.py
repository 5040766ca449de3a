"""A model that cannot be built from its configuration and schema says so in one line, before anything is read."""

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower
from tessera.embedding.errors import ConfigError
from tests.ctr.models.names import quick

TWO = "data.schema.features=[{name: a}, {name: b}]"
ONE = "data.schema.features=[{name: a}]"
MIXED = "data.schema.features=[{name: a}, {name: x, kind: numeric}]"


def refusal(*overrides: str) -> str:
    config = load_config([*overrides, "data.schema.time=null"], "")
    with pytest.raises(ConfigError) as error:
        build_tower(config, Schema(config.data.schema))
    message = str(error.value)
    assert "\n" not in message
    return message


CROSSING = [
    "fm",
    "deepfm",
    "deepfm_p",
    "ipnn",
    "opnn",
    "kpnn",
    "pin",
    "autoint",
    "autoint_plus",
    "fgcnn",
    "dcn_v2",
    "xdeepfm",
    "dcn",
    "edcn",
    "fmfm",
    "fwfm",
    "gdcn",
    "wukong",
    "fibinet",
    "afn",
    "afn_plus",
    "rank_mixer",
    "ecn",
    "fcn",
    "optinter",
]


@pytest.mark.parametrize("model", quick([*CROSSING, "dlrm"]))
def test_one_field_cannot_be_crossed(model):
    assert "1 embedded field(s); expected at least 2" in refusal(f"model={model}", ONE)


@pytest.mark.parametrize("model", quick(CROSSING))
def test_raw_values_are_not_fields(model):
    assert "expected at least 2 (numeric=raw embeds no numeric field)" in refusal(
        f"model={model}", MIXED, "numeric=raw"
    )


@pytest.mark.parametrize("model", ["lr", "dnn", "wide_deep", "final_mlp", "final_net", "mask_net"])
def test_models_that_need_no_pair(model):
    config = load_config([f"model={model}", ONE, "data.schema.time=null"], "")
    build_tower(config, Schema(config.data.schema))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=fgcnn"], "model.kernel is 7, higher than the 2 embedded fields; expected at most that"),
        (["model=fgcnn", "model.kernel=2"], "model.kernel is 2; expected an odd number of fields"),
        (["model=fgcnn", "model.kernel=1", "model.channels=[]"], "model.channels is empty"),
        (["model=fgcnn", "model.kernel=1", "model.pool=0"], "model.pool is 0; expected at least 1"),
        (
            ["model=fgcnn", "model.kernel=1", "model@model.classifier=lr"],
            "model.classifier.target is tessera.ctr.models.lr.LR; expected a model that reads one group of vectors",
        ),
        (
            ["model=fgcnn", "model.kernel=1", "model@model.classifier=afn_plus"],
            "model.classifier.target is tessera.ctr.models.afn.AFN; expected a model that reads one group of vectors",
        ),
        (
            ["model=fgcnn", "model.kernel=1", "+model.classifier.hiden=[3]"],
            "model.classifier.hiden is not a key of IPNN; did you mean model.classifier.hidden?",
        ),
        (["model=autoint", "model.heads=3"], "model.heads is 3; expected a divisor of model.attention_dim, 64"),
        (["model=autoint", "model.form=papre"], "model.form is 'papre'; expected paper or code"),
        (["model=autoint", "model.layers=0"], "model.layers is 0; expected at least 1 interacting layer"),
        (["model=autoint", "model.residual=plain"], "model.residual is 'plain'; expected true, false or identity"),
        (["model=autoint", "model.layer_norm=both"], "model.layer_norm is 'both'; expected null, none, before_relu"),
        (
            ["model=fgcnn", "model.kernel=1", "model.pool_padding=both", "model.pool=3"],
            "model.pool_padding is both and model.pool 3, and 2 fields leave 2, more than half a pool",
        ),
        (
            ["model=fgcnn", "model.kernel=1", "model.pool_padding=begin"],
            "model.pool_padding is 'begin'; expected end or both",
        ),
        (["model=kpnn", "model.kernel=matrix"], "model.kernel is 'matrix'; expected mat, vec, num"),
        (["model=pin", "model.subnet=[]"], "model.subnet is empty"),
        (["model=dcn_v2", "model.structure=both"], "model.structure is 'both'; expected parallel or stacked"),
        (["model=dcn_v2", "model.low_rank=99"], "model.low_rank is 99; expected null or 1 to 32"),
        (["model=xdeepfm", "model.maps=[]"], "model.maps is empty"),
        (["model=final_mlp", "model.heads=7"], "model.heads is 7; expected a divisor of the last widths"),
        (["model=final_mlp", "model.gate1_fields=[c]"], "model.gate1_fields names 'c', which is no embedded field"),
        (["model=fwfm", "model.linear_part=LV"], "model.linear_part is 'LV'; expected FiLV, FeLV, LW"),
        (["model=edcn", "model.bridge=attention"], "model.bridge is 'attention'; expected product, sum, concat"),
        (["model=mask_net", "model.hidden=[]"], "model.hidden is empty; expected the width of each block"),
        (["model=fibinet", "model.bilinear=pair"], "model.bilinear is 'pair'; expected all, each, interaction"),
        (["model=ecn", "model.heads=0"], "model.heads is 0; expected at least 1"),
        (["model=fcn", "model.deep_layers=0"], "model.deep_layers is 0; expected at least 1"),
        (
            ["model=final_net", "model.hidden1=[3]"],
            "model.hidden1 is [3]; expected even widths with model.res",
        ),
        (["model=rank_mixer", "model.tokens=7"], "model.tokens is 7; expected a divisor of model.width, 128"),
        (["model=dnn", "model.dropout=1"], "model.dropout is 1; expected 0 or more and less than 1"),
        (["model=dnn", "model.embedding_dim=0"], "model.embedding_dim is 0; expected at least 1"),
        (["model=dnn", "+model.hiden=[3]"], "model.hiden is not a key of DNN; did you mean model.hidden?"),
        (["model=dnn", "~model.hidden"], "model.hidden is missing; DNN needs embedding_dim, hidden"),
        (
            ["model=dnn", "model.target=tessera.ctr.models.dnn.DNM"],
            "model.target is 'tessera.ctr.models.dnn.DNM', which cannot be",
        ),
        (["numeric=autodis", "numeric.temperature=0"], "numeric.temperature is 0; expected a number above 0"),
        (["numeric=autodis", "numeric.buckets=0"], "numeric.buckets is 0; expected at least 1"),
        (["numeric=bucketised", "numeric.low=20"], "numeric.low is 20 and numeric.high 10.0; expected low < high"),
        (["numeric=scaled", "+numeric.buckets=3"], "numeric.buckets is not a key of ScaledVectors"),
    ],
)
def test_one_line_names_the_key(overrides, message):
    assert message in refusal(*overrides, MIXED)
