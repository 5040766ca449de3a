"""The formats of `embedding` become those of each table's groups."""

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_tower
from tessera.ctr.tables import build_tables
from tessera.embedding.errors import ConfigError
from tessera.embedding.optim import ScaleOptimizer


def tables_of(*overrides):
    config = load_config(["data=ml100k", "trainer.batch_size=4096", *overrides], "")
    schema = Schema(config.data.schema)
    tables = build_tables(config, schema, build_tower(config, schema), ranks=1).tables
    return {table.name: {group.name: group for group in table.groups} for table in tables}


def formats_of(*overrides):
    return {name: {group.format for group in groups.values()} for name, groups in tables_of(*overrides).items()}


def test_narrow_groups_stay_in_float32_unless_they_are_named():
    assert set(map(frozenset, formats_of("embedding.format=int8").values())) == {frozenset({"int8", "fp32"})}
    groups = tables_of("embedding.format=int8", "embedding.formats={w: fp16}")["user_id"]
    assert groups["v"].format == "int8" and groups["w"].format == "fp16"


def test_exceptions_by_group_table_and_both():
    overrides = ("embedding.format=bf16", "embedding.formats={item_id: int4, user_id.v: int2, w: fp16}")
    tables = tables_of(*overrides)
    found = {name: (tables[name]["v"].format, tables[name]["w"].format) for name in ("age", "item_id", "user_id")}
    assert found == {"age": ("bf16", "fp16"), "item_id": ("int4", "int4"), "user_id": ("int2", "fp16")}
    with pytest.raises(
        ConfigError, match="embedding.formats.item names no table and no group; did you mean 'item_id'?"
    ):
        tables_of("embedding.formats={item: int8}")


def test_scales():
    one = tables_of("embedding.format=int4", "embedding.range=0.5")["age"]["v"]
    assert one.scale == 0.5 / 8 and one.learned is None
    one = tables_of("embedding.format=int8", "embedding.scale=0.02", "embedding.alpt.every=1")["age"]["v"]
    assert one.scale == 0.02
    assert one.learned == ScaleOptimizer(2e-5, 0.0, pytest.approx((4096 * 16 * 127) ** -0.5))
    scales = {"dim": (16 * 127) ** -0.5, "none": 1.0}
    for name, scale in scales.items():
        options = ("embedding.format=int8", "embedding.alpt.every=1", f"embedding.alpt.gradient_scale={name}")
        assert tables_of(*options)["age"]["v"].learned.gradient_scale == pytest.approx(scale)


def test_what_cannot_work_is_one_line():
    with pytest.raises(
        ConfigError, match="table user_id: groups.v.format is 'int8'; expected fp32, .* with optimizer ftrl"
    ):
        tables_of("embedding.format=int8", "optimizer.sparse.name=ftrl")
    with pytest.raises(ConfigError, match="embedding.alpt.every is 1, but no group has a scale to learn"):
        tables_of("embedding.alpt.every=1")
    with pytest.raises(ConfigError, match="optimizer.sparse.state_format is bf16, which only adam reads"):
        tables_of("optimizer.sparse.name=sgd", "optimizer.sparse.state_format=bf16")
