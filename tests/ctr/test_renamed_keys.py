"""Names of earlier versions: one line with the new name for a user's own, a translation for files of earlier runs."""

import copy

import pytest
from omegaconf import OmegaConf

from tessera.ctr.config import load_config
from tessera.ctr.config_types import Config
from tessera.ctr.overrides import keys_of
from tessera.ctr.renamed_keys import KEYS, VALUES, translate
from tessera.ctr.runs.convert import convert_run
from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.stored_config import read_config
from tessera.ctr.train.check_state import changed_keys
from tessera.embedding.errors import ConfigError

MORE = ["embedding.oov=learned", "embedding.init=oov", "embedding.format=int8", "embedding.scale=0.5"]
MORE += ["embedding.pooled_output_dist=auto", "daily.bands.window=5", "trainer.checkpoint.keep_last=4"]


def plain(config) -> dict:
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)


def of_version_0_1(written: dict) -> dict:
    """A configuration as version 0.1 wrote it into its run folder and its states."""
    written = copy.deepcopy(written)
    embedding, checkpoint, daily = written["embedding"], written["trainer"]["checkpoint"], written["daily"]
    embedding["others"], embedding["bag_path"] = embedding.pop("oov"), embedding.pop("pooled_output_dist")
    embedding["first_values"] = {"oov": "others", "random": "random"}[embedding.pop("init")]
    embedding["step"] = embedding.pop("scale")
    checkpoint["keep"], daily["guard"] = checkpoint.pop("keep_last"), daily.pop("bands")
    return written


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config([*overrides], "")
    return str(error.value)


def test_every_new_name_is_a_key_and_no_earlier_one_is():
    known = {key for key, _ in keys_of(Config)}
    assert {*KEYS.values(), *VALUES} <= known and not KEYS.keys() & known


@pytest.mark.parametrize(
    ("override", "message"),
    [(f"{old}=1", f"{old} is now {now}") for old, now in KEYS.items() if old != "daily.guard"]
    + [
        ("++embedding.others=learned", "embedding.others is now embedding.oov"),
        ("daily.guard.window=3", "daily.guard.window is now daily.bands.window"),
        ("embedding.first_values=others", "embedding.first_values=others is now embedding.init=oov"),
        ("embedding.init=others", "embedding.init=others is now embedding.init=oov"),
    ],
)
def test_an_earlier_name_on_the_command_line_ends_with_the_new_one(override, message):
    assert refused(override) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embedding: {others: null}", "embedding.others is now embedding.oov"),
        ("embedding: {init: others}", "embedding.init=others is now embedding.init=oov"),
        ("daily: {guard: {auc: 0.1}}", "daily.guard is now daily.bands"),
        ("trainer: {checkpoint: {keep: 3}}", "trainer.checkpoint.keep is now trainer.checkpoint.keep_last"),
    ],
)
def test_an_earlier_name_in_a_users_own_yaml_ends_with_the_new_one(tmp_path, text, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    assert refused("--config-dir", str(tmp_path), "experiment=mine") == message


def test_the_configuration_of_an_earlier_run_is_read(tmp_path):
    config = load_config([*MORE, "data.path=/data"], "")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(of_version_0_1(plain(config))))
    assert OmegaConf.to_container(read_config(tmp_path / "config.yaml")) == plain(config)
    assert run_config(tmp_path, ["trainer.checkpoint.keep_last=7"]).trainer.checkpoint.keep_last == 7
    with pytest.raises(ConfigError, match=r"^trainer.checkpoint.keep is now trainer.checkpoint.keep_last$"):
        run_config(tmp_path, ["trainer.checkpoint.keep=7"])
    with pytest.raises(ConfigError, match=r"^embedding.step is now embedding.scale$"):
        convert_run(tmp_path, tmp_path / "out", ["embedding.step=0.1"], None)


def test_what_has_changed_since_an_earlier_state_is_told_without_what_is_only_renamed():
    config = load_config(MORE, "")
    before = of_version_0_1(plain(config))
    assert changed_keys(before, config) == []
    assert "others" in before["embedding"]  # as it was
    config.embedding.oov = "zeros"
    assert changed_keys(before, config) == ["embedding.oov 'learned' -> 'zeros'"]


@pytest.mark.parametrize("written", [{}, {"embedding": None}, {"embedding": [1]}, {"trainer": {"checkpoint": 3}}])
def test_a_configuration_that_is_none_is_left_alone(written):
    before = dict(written)
    translate(written)
    assert written == before
