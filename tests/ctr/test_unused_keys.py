"""Every key of embedding and optimizer that is set and does nothing ends the job in one line that names it."""

from dataclasses import MISSING, fields

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.config_types import AlptConfig, Config, EmbeddingConfig, SparseConfig
from tessera.ctr.unused_keys import OF_STATIC
from tessera.embedding.config import Admission
from tessera.embedding.errors import ConfigError

NAMED = {
    "oov": "learned",
    "init": "oov",
    "pooled_output_dist": "always",
    "clock": "wall",
    "eviction": "lru",
    "format": "int8",
    "formats": "{v: int8}",
    "tables": "{C1: {ttl_days: 9}}",
    "rounding": "nearest",
    "transport": "bf16",
    "exchange": "by_host",
    "kind": "exact",
    "gradient_scale": "dim",
}


def keys_of(section: type, prefix: str, leave_out: tuple[str, ...] = ()) -> list[str]:
    """An override of every key of a section, with a value that is not its default."""
    overrides = []
    for field in fields(section):
        if field.name in leave_out or field.default is MISSING:
            continue
        value = NAMED.get(field.name, 9)
        assert value != field.default
        overrides.append(f"{prefix}.{field.name}={value}")
    return overrides


STATIC = keys_of(EmbeddingConfig, "embedding", (*OF_STATIC, "admission", "alpt"))
STATIC += keys_of(Admission, "embedding.admission") + keys_of(AlptConfig, "embedding.alpt")
STATIC += ["optimizer.sparse.weight_decay=0.1", "optimizer.sparse.initial_accumulator=0.1"]
STATIC += ["optimizer.sparse.decay=0.1", "optimizer.sparse.state_format=bf16", "optimizer.sparse.old_rows_factor=0.5"]
STATIC += ["optimizer.helen.rho=0.05", "optimizer.helen.xi=0.5", "optimizer.helen.dense=true"]
OF_OPTIMIZERS = {
    "beta1=0.5": ("adam",),
    "beta2=0.5": ("adam",),
    "beta=0.5": ("ftrl",),
    "l1=0.5": ("ftrl",),
    "l2=0.5": ("ftrl",),
    "eps=1e-6": ("adam", "adagrad", "rowwise_adagrad"),
    "initial_accumulator=0.1": ("adagrad", "rowwise_adagrad"),
    "state_format=bf16": ("adam",),
}
DYNAMIC = {
    "embedding.admission.threshold=3": ["embedding.admission.kind=exact"],
    "embedding.admission.capacity=99": ["embedding.admission.kind=sliding"],
    "embedding.admission.splits=5": ["embedding.admission.kind=sliding"],
    "embedding.alpt.lr=0.1": ["embedding.alpt.every=1", "embedding.format=int8"],
    "embedding.alpt.weight_decay=0.1": ["embedding.alpt.every=1", "embedding.format=int8"],
    "embedding.alpt.gradient_scale=dim": ["embedding.alpt.every=1", "embedding.format=int8"],
    "embedding.rounding=nearest": ["embedding.formats={v: bf16}"],
    "embedding.range=0.1": ["embedding.format=int4"],
    "embedding.scale=0.1": ["embedding.formats={v: int2}"],
    "embedding.eviction=lru": ["embedding.max_rows=10000"],
    "optimizer.sparse.decay_count_power=1": ["optimizer.sparse.decay=0.1"],
    "optimizer.helen.xi=0.5": ["optimizer.helen.rho=0.05"],
    "optimizer.helen.dense=true": ["optimizer.helen.rho=0.05"],
    "optimizer.plateau.patience=2": ["optimizer.plateau.factor=0.5"],
    "optimizer.plateau.floor=0.1": ["optimizer.plateau.factor=0.5"],
}


def load(*overrides: str, kind: str = "dynamic") -> Config:
    return load_config([f"embedding={kind}", *overrides], "")


def refused(*overrides: str, kind: str = "dynamic") -> str:
    with pytest.raises(ConfigError) as error:
        load(*overrides, kind=kind)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("override", STATIC)
def test_static_tables_refuse_what_they_do_not_read(override):
    key, _, value = override.partition("=")
    key = "embedding.formats.v" if key == "embedding.formats" else key
    assert refused(override, kind="static").startswith(f"{key} is ") or key.endswith(".init")


def test_static_tables_read_the_rest():
    known = ["embedding.rows=7", "embedding.init_std=0.5", "embedding.l2=0.1", "optimizer.sparse.eps=1e-6"]
    load(*known, "optimizer.sparse.warmup_steps=3", kind="static")


@pytest.mark.parametrize("override", OF_OPTIMIZERS)
@pytest.mark.parametrize("name", ["adam", "adagrad", "rowwise_adagrad", "sgd", "ftrl"])
def test_optimizers_refuse_each_others_keys(override, name):
    settings = [f"optimizer.sparse.name={name}", f"optimizer.sparse.{override}"]
    if name in OF_OPTIMIZERS[override]:
        load(*settings)
    else:
        key = override.partition("=")[0]
        assert refused(*settings).startswith(f"optimizer.sparse.{key} is ")


def test_every_key_of_one_optimizer_alone_is_looked_at():
    common = {
        "name",
        "lr",
        "weight_decay",
        "warmup_steps",
        "old_rows_factor",
        "decay",
        "decay_count_power",
        "clip_norm",
    }
    common.add("schedule")
    own = {override.partition("=")[0] for override in OF_OPTIMIZERS}
    assert own | common == {field.name for field in fields(SparseConfig)}


def test_the_dense_optimizer_refuses_what_it_does_not_read():
    found = refused("optimizer.dense.name=sgd", "optimizer.dense.eps=1e-6")
    assert found.startswith("optimizer.dense.eps is 1e-06, which only adam and adamw and adagrad read")
    found = refused("optimizer.dense.name=adagrad", "optimizer.dense.beta1=0.95")
    assert found.startswith(
        "optimizer.dense.beta1 is 0.95, which only adam and adamw read; optimizer.dense.name is adagrad"
    )


@pytest.mark.parametrize("override", DYNAMIC)
def test_keys_that_need_another_are_refused_without_it(override):
    key = override.partition("=")[0]
    assert refused(override).startswith(f"{key} is ")
    load(override, *DYNAMIC[override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["embedding.format=int8", "embedding.alpt.every=2"],
         "embedding.alpt.every is 2: each wants the second pass of a step; set rho=0 or alpt.every=null"),
        (["embedding.cache_rows=5000"],
         "cache_rows is 5000: tables with a cache have no pass over perturbed rows; set rho=0 or cache_rows=null"),
    ],
)  # fmt: skip
def test_helen_is_refused_beside_what_it_cannot_do(overrides, message):
    assert refused("optimizer.helen.rho=0.05", *overrides) == f"optimizer.helen.rho is 0.05, and {message}"
    load(*overrides)


def test_a_range_is_refused_beside_the_step_that_replaces_it():
    found = refused("embedding.format=int8", "embedding.scale=0.01", "embedding.range=0.1")
    assert found == "embedding.range is 0.1, which embedding.scale takes the place of; set one of them"
