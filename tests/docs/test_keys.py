"""The page of every key has every key of the configuration, each with words that explain it."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass

import pytest
import yaml

from tessera.ctr.config import Config, load_config
from tessera.ctr.config_types import ParameterGroup
from tessera.ctr.data.convert.csv import ColumnConfig, CsvConfig
from tessera.ctr.data.schema import FeatureConfig
from tessera.scripts.docs import comments, keys


@pytest.fixture(scope="module")
def written() -> dict[str, keys.Key]:
    found = [(f"{section.title}: {key.name}", key) for section in keys.sections() for key in section.keys]
    assert len(dict(found)) == len(found), "a key stands twice"
    return dict(found)


def leaves(config, prefix=""):
    """Dotted names of all keys of a configuration, without the groups whose files name their own."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif prefix or field.name not in keys.OPEN_GROUPS:
            yield f"{prefix}{field.name}"


def test_every_key_is_there(written):
    known = {key.name for key in written.values()}
    expected = set(leaves(load_config([], ""))) - {"data.schema.features", "optimizer.dense.groups"}
    expected |= {f"optimizer.dense.groups[].{field.name}" for field in fields(ParameterGroup)}
    expected |= {f"data.schema.features[].{field.name}" for field in fields(FeatureConfig)}
    expected |= set(leaves(CsvConfig())) - {"columns"} | {f"columns[].{field.name}" for field in fields(ColumnConfig)}
    assert not expected - known


@pytest.mark.parametrize("path", sorted(keys.CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_file_and_its_keys_are_there(written, path):
    group = path.parent.name
    if group in keys.OPEN_GROUPS:
        own = set(yaml.safe_load(path.read_text())) - {"target", "defaults"}
        assert own <= {name.rpartition(".")[2] for name in written if name.startswith(f"{group}={path.stem}: ")}
    elif group == "experiment":
        assert f"Experiments: {path.stem}" in written
    elif group not in ("prepare", "tune"):
        assert path.stem in written[f"Groups: {group}"].comment


def test_every_key_is_explained(written):
    assert not [name for name, key in written.items() if len(key.comment.split()) < 2]


def test_every_key_has_its_default(written):
    defaults = {key.name: key.default for key in written.values()}
    assert (defaults["trainer.batch_size"], defaults["trainer.run_dir"]) == ("4096", "null")
    assert defaults["data.schema.features[].name"] == defaults["columns[].name"] == "must be given"
    assert defaults["daily.marker"] == "_SUCCESS" and defaults["trainer.shuffle"] == "true"
    assert defaults["data.schema.labels"] == "[label]" and not any("???" in value for value in defaults.values())


def test_the_page_shows_comments_letter_by_letter():
    key = keys.Key("a.b", "text", "null", "x | y: *z* <b> [c](d) _e_; docs/low_precision.md")
    line = keys._written(keys.Section("a", 2, "", [key])).splitlines()[-1]
    assert line.count("|") == 5 and "<b>" not in line and "*" not in line
    assert "[low precision](../low_precision.md)" in line


def test_comments_of_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "# The top,\n# two lines.\na: 1  # first\n# above b\nb: 2\nc:  # a block\n  d: 3  # begins\n"
        "         # and goes on\n  e: x#y\n"
    )
    top, found = comments.of_yaml(path)
    assert top == "The top, two lines."
    assert found == {"a": "first", "b": "above b", "c": "a block", "c.d": "begins and goes on", "c.e": ""}


@dataclass
class Example:
    """Of the test below."""

    a: int = 1  # behind
    # in front,
    # two lines
    b: str = "x"
    c: float = 0.0


def test_comments_of_a_dataclass():
    assert comments.of_dataclass(Example) == {"a": "behind", "b": "in front, two lines", "c": ""}
    assert set(comments.of_dataclass(Config)) == {field.name for field in fields(Config)}
