"""Spaces of settings: mistakes end in one line, values become overrides, and every model has one that it takes."""

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.config_help import choices
from tessera.ctr.tune import space
from tessera.ctr.tune.space import Choices, Range, as_given, overrides_of, read_space, space_of
from tessera.embedding.errors import ConfigError

JOB = ["model=dnn", "data.path=/x"]


def refused(entries: dict, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        space_of("s", entries, [*JOB, *overrides])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def composed(monkeypatch):
    """One configuration for all: composing it again and again takes most of the time."""
    config = load_config(JOB, "")
    monkeypatch.setattr(space, "load_config", lambda *_: config)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (3, "is 3; expected {low: .., high: ..} or {choices: [..]}"),
        ({"low": 0.1, "hihg": 1}, "unknown 'hihg'; did you mean 'high'?"),
        ({"low": 0.1}, "high is None; expected a number"),
        ({"low": "a", "high": 1}, "low is 'a'; expected a number"),
        ({"low": True, "high": 1}, "low is True; expected a number"),
        ({"low": 0.5, "high": 0.1}, "low is 0.5 and high is 0.1; expected low below high"),
        ({"low": 0.5, "high": 0.5}, "expected low below high"),
        ({"low": 0, "high": 1, "log": True}, "low is 0 with log: true; expected more than 0"),
        ({"low": 1, "high": 2, "log": "yes"}, "log is 'yes'; expected true or false"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "has log and step; expected one of both"),
        ({"low": 1, "high": 2, "step": 3}, "step is 3; expected more than 0, at most high - low"),
        ({"choices": [1]}, "choices are [1]; expected a list of two or more"),
        ({"choices": [[4], [4]]}, "choices have [4] twice; expected each once"),
        ({"choices": [1, 2], "low": 1}, "has choices and low; expected one"),
    ],
)
def test_values_that_are_none(composed, entry, said):
    found = refused({"model.dropout": entry})
    assert found.startswith("space s: model.dropout") and said in found


def test_a_key_that_is_none():
    said = refused({"model.dropot": {"low": 0.0, "high": 0.1}})
    assert said.startswith("space s: unknown key 'model.dropot'") and "did you mean 'model.dropout'?" in said


@pytest.mark.slow
def test_a_value_that_the_key_does_not_take():
    assert refused({"optimizer.dense.lr": {"low": -1.0, "high": 0.1}}).startswith("space s: optimizer.dense.lr")
    assert refused({"model.dropout": {"choices": [0.1, 0.2]}, "trainer.epochs": {"choices": ["a", 2]}})


@pytest.mark.parametrize("key", ["data.path", "trainer.run_dir", "trainer.seed", "trainer.checkpoint.every"])
def test_what_trials_share_is_in_no_space(composed, key):
    assert f"{key} is the same in all trials" in refused({key: {"low": 1, "high": 2}})


def test_a_key_is_given_once(composed):
    said = refused({"model.dropout": {"low": 0.0, "high": 0.5}}, "model.dropout=0.1")
    assert said == "model.dropout is given after -- and in space s; expected one of both"


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="no space 'depfm'; did you mean 'deepfm'?"):
        read_space("depfm")
    for text, said in (("- 1", "expected a mapping"), ("a: [", "cannot be read as YAML"), ("", "expected a mapping")):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_space(str(tmp_path / "s.yaml"))
    (tmp_path / "s.yaml").write_text("extends: comon\n")
    with pytest.raises(ConfigError, match="extends is 'comon'; did you mean 'common'?"):
        read_space(str(tmp_path / "s.yaml"))


def test_a_space_extends_another(tmp_path):
    (tmp_path / "s.yaml").write_text("extends: common\noptimizer.dense.lr: {low: 0.1, high: 0.2}\n")
    entries = read_space(str(tmp_path / "s.yaml"))[1]
    assert entries["optimizer.dense.lr"] == {"low": 0.1, "high": 0.2} and "optimizer.sparse.lr" in entries


def test_values_become_overrides(composed):
    entries = {
        "model.dropout": {"low": 0, "high": 1},
        "trainer.batch_size": {"low": 1000, "high": 9000},
        "model.hidden": {"choices": [[4, 2], [8]]},
        "optimizer.dense.clip_norm": {"choices": [None, 1.0]},
    }
    found = space_of("s", entries, JOB)
    assert found["model.dropout"] == Range(0, 1), "a key that holds a float takes any between whole numbers"
    assert found["trainer.batch_size"] == Range(1000, 9000, whole=True)
    assert found["model.hidden"] == Choices(("[4,2]", "[8]"))
    given = as_given(found, space.load_config(JOB, ""))
    assert given == {"model.dropout": 0.0, "trainer.batch_size": 4096, "optimizer.dense.clip_norm": "null"}
    assert overrides_of({"model.dropout": 1e-05, "model.hidden": "[4,2]"}) == [
        "model.dropout=1e-05",
        "model.hidden=[4,2]",
    ]


def test_every_model_has_a_space():
    spaces = {path.stem for path in space.SHIPPED.glob("*.yaml")}
    assert spaces == {*choices()["model"], "common"}


@pytest.mark.slow
@pytest.mark.parametrize("model", choices()["model"])
def test_every_space_is_of_its_model(model):
    where, entries = read_space(model)
    space_of(where, entries, [f"model={model}", "data.path=/x"])
