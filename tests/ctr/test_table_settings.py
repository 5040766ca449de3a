"""Settings of single tables: how they are written, what they are over, and what is refused."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from tessera.ctr.config import load_config, typed
from tessera.ctr.config_types import ROW_RATES, EmbeddingConfig, SparseConfig
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower
from tessera.ctr.table_settings import OWN, TableOptimizer, TableSettings, large_row_rate, settings_of
from tessera.ctr.tables import build_tables
from tessera.embedding.config import Admission
from tessera.embedding.errors import ConfigError
from tessera.embedding.optim import RowOptimizer

COMMON = ["data=ml100k", "data.schema.time=timestamp", "trainer.batch_size=512"]


def tables_of(*overrides, ranks=1):
    config = load_config([*COMMON, *overrides], "")
    schema = Schema(config.data.schema)
    return {t.name: t for t in build_tables(config, schema, build_tower(config, schema), ranks).tables}


def refused(*overrides, ranks=1):
    with pytest.raises(ConfigError) as error:
        tables_of(*overrides, ranks=ranks)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_table_has_what_it_names_and_the_rest_of_all():
    tables = tables_of(
        "embedding.ttl_days=10",
        "embedding.max_rows=100000",
        "embedding.eviction=lru",
        "embedding.init_std=0.5",
        "optimizer.sparse.name=rowwise_adagrad",
        "optimizer.sparse.lr=0.2",
        "embedding.tables.user_id={ttl_days: 30, max_rows: 5000, admission: {kind: exact, threshold: 3}}",
        "embedding.tables.item_id.ttl_days=null",
        "embedding.tables.item_id.optimizer={name: adam, beta1: 0.5}",
        "embedding.tables.item_id.lr=1e-3",
        "embedding.tables.item_id.init_std=0.25",
        "embedding.tables.age.eviction=lfu",
        ranks=2,
    )
    user, item, age, other = (tables[name] for name in ("user_id", "item_id", "age", "gender"))
    assert [t.ttl_seconds for t in (user, item, age)] == [30 * 86400, None, 10 * 86400]
    assert (user.max_rows, item.max_rows) == (2500, 50000)
    assert (user.admission, item.admission) == (Admission("exact", 3), Admission())
    assert item.optimizer == RowOptimizer("adam", lr=0.001, beta1=0.5)
    assert user.optimizer == age.optimizer == other.optimizer == RowOptimizer(lr=0.2)
    assert {g.init_std for g in item.groups} == {0.25} and {g.init_std for g in user.groups} == {0.5}
    assert (user.eviction, age.eviction) == ("lru", "lfu")


def test_the_rest_is_bit_for_bit_what_it_is_without():
    plain, own = tables_of(), tables_of("embedding.tables.user_id.ttl_days=30")
    assert {n: t for n, t in own.items() if n != "user_id"} == {n: t for n, t in plain.items() if n != "user_id"}
    assert dataclasses.replace(own["user_id"], ttl_seconds=None) == plain["user_id"]


def test_every_key_of_one_table_is_that_of_all_but_for_null():
    """So that a key that is added to one is thought of for the other."""
    whole = {field.name for field in dataclasses.fields(EmbeddingConfig)}
    assert {field.name for field in dataclasses.fields(TableSettings)} - {*OWN} <= whole
    of_optimizer = {field.name for field in dataclasses.fields(TableOptimizer)}
    assert of_optimizer == {field.name for field in dataclasses.fields(RowOptimizer)} - {"lr", "decay"}


def test_another_optimizer_leaves_out_what_it_does_not_read():
    whole = ["optimizer.sparse.name=adam", "optimizer.sparse.state_format=bf16", "optimizer.sparse.beta1=0.5"]
    tables = tables_of(*whole, "embedding.tables.user_id.optimizer=ftrl", "embedding.tables.user_id.optimizer.l1=0.1")
    assert tables["user_id"].optimizer == RowOptimizer("ftrl", lr=ROW_RATES["ftrl"], l1=0.1)
    assert tables["age"].optimizer == RowOptimizer("adam", lr=ROW_RATES["adam"], state_format="bf16", beta1=0.5)


def test_a_rate_that_nobody_gave_is_that_of_the_optimizer():
    """What is a good rate for one is none for another; so a table of another optimizer than the rest has its own."""
    assert load_config(COMMON, "").optimizer.sparse == SparseConfig(name="adam", lr=ROW_RATES["adam"])
    for name, rate in ROW_RATES.items():
        tables = tables_of(f"optimizer.sparse.name={name}", "embedding.tables.user_id.optimizer=sgd")
        assert (tables["age"].optimizer.name, tables["age"].optimizer.lr) == (name, rate)
        assert (tables["user_id"].optimizer.name, tables["user_id"].optimizer.lr) == ("sgd", ROW_RATES["sgd"])
    tables = tables_of(
        "optimizer.sparse.lr=0.3", "embedding.tables={user_id: {optimizer: ftrl, lr: 0.4}, age: {lr: 1}}"
    )
    assert [tables[name].optimizer.lr for name in ("user_id", "age", "gender")] == [0.4, 1, 0.3]
    static = load_config([*COMMON, "embedding=static"], "").optimizer.sparse
    assert (static.name, static.lr) == ("rowwise_adagrad", ROW_RATES["rowwise_adagrad"])
    saved = load_config([*COMMON, "optimizer=adam_adagrad"], "").optimizer.sparse
    assert (saved.name, saved.lr) == ("rowwise_adagrad", ROW_RATES["rowwise_adagrad"])


def test_a_rate_that_was_chosen_for_adagrad_is_warned_of():
    assert large_row_rate(load_config(COMMON, "")) is None
    said = large_row_rate(load_config([*COMMON, "optimizer.sparse.lr=0.05"], ""))
    assert said is not None and said.startswith("rows learn by Adam at a rate of 0.05, where 0.0015 is usual")
    assert large_row_rate(load_config([*COMMON, "optimizer=adam_adagrad", "optimizer.sparse.lr=0.05"], "")) is None


def test_formats():
    tables = tables_of("embedding.format=bf16", "embedding.formats={w: fp16}", "embedding.tables.user_id.format=int8")
    found = {name: [group.format for group in tables[name].groups] for name in ("user_id", "age")}
    assert found == {"user_id": ["int8", "fp16"], "age": ["bf16", "fp16"]}
    tables = tables_of("embedding.tables.user_id={format: int4, range: 0.5, rounding: nearest}")
    assert tables["user_id"].groups[0].scale == 0.5 / 8 and tables["user_id"].groups[0].rounding == "nearest"
    assert [group.format for group in tables["age"].groups] == ["fp32", "fp32"]
    assert refused("embedding.formats={age: int8}", "embedding.tables.age.format=int8") == (
        "embedding.formats.age and embedding.tables.age.format are both set; set one of them"
    )


def test_the_dim_of_a_table_is_that_of_the_towers_widest_groups():
    def dims(table, *overrides):
        return {group.name: group.dim for group in tables_of(*overrides)[table].groups}

    own = ["embedding.tables.age.dim=4", "model.embedding_dim=16"]
    assert dims("age", *own) == {"v": 4, "w": 1} and dims("gender", *own) == {"v": 16, "w": 1}
    assert dims("age", "model=fgcnn", *own) == {"v": 4, "generation": 4}
    assert dims("age", *own, "embedding.tables.age.dim=null") == {"v": 16, "w": 1}
    assert dims("age", "model=lr", "embedding.tables.age.dim=1") == {"w": 1}
    assert refused("embedding.tables.age.dim=17", "model.embedding_dim=16") == (
        "embedding.tables.age.dim is 17; expected at most 16, the dim of the tower"
    )
    assert "age.dim is 2; expected at most 1, the dim" in refused("embedding.tables.age.dim=2", "model=lr")
    assert refused("embedding.tables.age.dim=0").startswith("embedding.tables.age.dim is 0; expected at least 1")


def test_a_narrow_row_that_no_format_makes_smaller_stays_in_float32():
    tables = tables_of("embedding.format=int8", "embedding.tables.age.dim=1")
    assert [group.format for group in tables["age"].groups] == ["fp32", "fp32"]


@pytest.mark.parametrize(
    ("override", "table", "settings"),
    [
        ("embedding.tables.a.b.ttl_days=3", "a.b", {"ttl_days": 3.0}),
        ("embedding.tables.a.b={ttl_days: 3}", "a.b", {"ttl_days": 3.0}),
        ("embedding.tables.a.admission.kind=exact", "a", {"admission": {"kind": "exact"}}),
        ("embedding.tables.'a=b'.ttl_days=3", "a=b", {"ttl_days": 3.0}),
        ('embedding.tables."a b".ttl_days=null', "a b", {"ttl_days": None}),
        ("embedding.tables.é, [x]{.lr=1", "é, [x]{", {"lr": 1.0}),
        ('embedding.tables={"a=b, c": {lr: 1e-3}}', "a=b, c", {"lr": 0.001}),
        ("+embedding.tables.a.optimizer=adam", "a", {"optimizer": {"name": "adam"}}),
    ],
)
def test_names_of_tables_may_be_any(override, table, settings):
    config = load_config([*COMMON, override], "")
    assert config.embedding.tables == {table: settings}
    assert typed(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))) == config


def test_the_command_line_is_over_the_yaml(tmp_path):
    (tmp_path / "embedding").mkdir()
    text = "tables: {user_id: {ttl_days: 30, optimizer: adam}, item_id: {lr: 0.5}}\n"
    (tmp_path / "embedding" / "mine.yaml").write_text(text)
    mine = ["--config-dir", str(tmp_path), "embedding=mine", *COMMON]
    more = ["embedding.tables.user_id.ttl_days=null", "embedding.tables.user_id.optimizer.beta2=0.9"]
    assert load_config([*mine, *more, "embedding.tables.age={lr: 1}"], "").embedding.tables == {
        "user_id": {"ttl_days": None, "optimizer": {"name": "adam", "beta2": 0.9}},
        "item_id": {"lr": 0.5},
        "age": {"lr": 1.0},
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["user.ttl_days=3"], "embedding.tables.user: no feature has a table of this name; did you mean 'user_id'?"),
        (["user_id.ttl_day=3"], "unknown key 'embedding.tables.user_id.ttl_day' in override .*did you mean 'ttl_days'"),
        (["user_id={ttl_day: 3}"], "unknown key 'embedding.tables.user_id.ttl_day'; did you mean 'ttl_days'?"),
        (["user_id.admission.knd=3"], "unknown key 'embedding.tables.user_id.admission.knd' .*mean 'kind'"),
        (["user_id={admission: {knd: 3}}"], "unknown key 'embedding.tables.user_id.admission.knd'; did you mean 'kin"),
        (["user_id.optimizer.lr=1"], "unknown key 'embedding.tables.user_id.optimizer.lr' .* known: name, eps"),
        (["user_id=3"], "embedding.tables.user_id is 3; expected keys and values"),
        (["user_id.admission=exact"], "embedding.tables.user_id.admission is 'exact'; expected keys and values"),
        (["user_id.ttl_days"], "override 'embedding.tables.user_id.ttl_days' has no '='; expected key=value"),
        (["user_id.max_rows=x"], "embedding.tables.user_id.max_rows: Value 'x' of type 'str'"),
        (["user_id.max_rows=0"], "embedding.tables.user_id.max_rows is 0; expected at least 1"),
        (["user_id.lr=null"], "embedding.tables.user_id.lr is null; leave the key out"),
        (["user_id.optimizer=adan"], "embedding.tables.user_id.optimizer.name is 'adan'; .* did you mean adam?"),
        (["user_id.max_rows=511"], "table user_id: max_rows 511 is a limit of 511 rows; expected at least 512,"),
        (["user_id={format: int8, optimizer: ftrl}"], "table user_id: groups.v.format is 'int8'; .* ftrl"),
        (["user_id.eviction=lru"], "embedding.tables.user_id.eviction is lru, which needs a limit"),
        (["user_id.range=0.1"], "embedding.tables.user_id.range is 0.1, which only int formats read"),
        (["user_id.admission.threshold=3"], "embedding.tables.user_id.admission.threshold is 3, which needs"),
        (["user_id.optimizer={name: sgd, beta1: 0.5}"],
         "embedding.tables.user_id.optimizer.beta1 is 0.5, which only adam reads; that of user_id is sgd"),
        (["user_id.ttl_days=2024-13-45"], "embedding.tables.user_id.ttl_days is 2024-13-45, which is no YAML"),
        (["user_id.lr=!!float x"], "embedding.tables.user_id.lr is !!float x, which is no YAML; expected"),
        (["user_id.lr=!!int ''"], "embedding.tables.user_id.lr is !!int '', which is no YAML; expected"),
        (["user_id.admission.kind=&a [*a]"], "embedding.tables.user_id.admission.kind is &a [*a], which is no YAML"),
        (["user_id.dim=" + "[" * 3000], "embedding.tables.user_id.dim is [["),
        (["user_id.dim=99999999999999999999"],
         "embedding.tables.user_id.dim is 99999999999999999999; expected a whole number of at most 64 bits"),
        (["user_id.cache_rows=10000"], "embedding.tables: user_id has a cache .* and item_id has none; expected"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(overrides, message):
    found = refused(*(f"embedding.tables.{one}" for one in overrides))
    start, *rest = message.split(".*")
    assert found.startswith(start.strip()) and all(part.strip() in found for part in rest), found


def test_static_tables_have_none_of_it():
    found = refused("embedding=static", "embedding.tables.user_id.init_std=0.1")
    assert found.startswith("embedding.tables is {'user_id': {'init_std': 0.1}}, which static tables do not read")


def test_rows_that_expire_in_one_table_need_times_as_well():
    with pytest.raises(ConfigError, match=r"embedding.tables.user_id.ttl_days is set, but data.schema.time names no"):
        load_config(["data=ml100k", "data.schema.time=null", "embedding.tables.user_id.ttl_days=3"], "")


def test_a_key_of_all_that_some_table_reads_is_no_mistake():
    tables = tables_of("embedding.eviction=lru", "embedding.tables.user_id.max_rows=5000")
    assert tables["user_id"].eviction == "lru" and tables["age"].row_limit is None
    tables_of("optimizer.sparse.name=sgd", "optimizer.sparse.beta1=0.5", "embedding.tables.user_id.optimizer=adam")
    said = refused("optimizer.sparse.name=sgd", "optimizer.sparse.beta1=0.5")
    assert said.startswith("optimizer.sparse.beta1 is 0.5, which only adam reads")


def test_one_table_alone_is_as_all_with_the_same_keys():
    config = load_config([*COMMON, "embedding.tables.age={lr: 0.5}"], "")
    embedding, sparse = settings_of(config, "gender")
    assert embedding is config.embedding and sparse is config.optimizer.sparse
    assert settings_of(config, "age")[1] == dataclasses.replace(sparse, lr=0.5)
