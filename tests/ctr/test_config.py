"""The command line: defaults compose, mistakes are one line that names the nearest key."""

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from ctr.config import Config, load_config
from embedding.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.btch_size=3"], "unknown key 'trainer.btch_size' in override 'trainer.btch_size=3'; "
                                  "did you mean 'trainer.batch_size'?"),
        (["modle=deepfm"], "unknown key 'modle' in override 'modle=deepfm'; did you mean 'model'?"),
        (["model=deepfmm"], "no model 'deepfmm'; did you mean 'deepfm'? (a yaml of your own: --config-dir)"),
        (["trainer.batch_size=abc"], "trainer.batch_size: Value 'abc' of type 'str' could not be converted to Integer"),
        (["trainer.batch_size=0"], "trainer.batch_size is 0; expected at least 1"),
        (["optimizer.sparse.lr=-1"], "optimizer.sparse.lr is -1.0; expected a number above 0"),
        (["embedding.format=int9"],
         "embedding.format is 'int9'; expected fp32, fp16, bf16, int8, int4 or int2; did you mean int8?"),
        (["embedding.formats={w: fp8}"],
         "embedding.formats.w is 'fp8'; expected fp32, fp16, bf16, int8, int4 or int2"),
        (["embedding.rounding=up"], "embedding.rounding is 'up'; expected stochastic or nearest"),
        (["embedding.step=0"], "embedding.step is 0.0; expected a number above 0"),
        (["embedding.range=-1"], "embedding.range is -1.0; expected a number above 0"),
        (["embedding.alpt.every=0"], "embedding.alpt.every is 0; expected at least 1"),
        (["embedding.alpt.gradient_scale=rows"],
         "embedding.alpt.gradient_scale is 'rows'; expected batch, dim or none"),
        (["embedding.transport=int8"], "embedding.transport is 'int8'; expected fp32, fp16 or bf16"),
        (["embedding=static", "+embedding.format=int8"],
         "embedding.format is int8; static tables have fp32 alone (embedding=dynamic has more)"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(overrides, "")
    assert str(error.value) == message


def test_unknown_key_in_a_users_own_yaml(tmp_path):
    (tmp_path / "trainer").mkdir()
    text = (ROOT / "conf/trainer/default.yaml").read_text()
    (tmp_path / "trainer" / "mine.yaml").write_text(text.replace("epochs:", "epoch:"))
    with pytest.raises(ConfigError, match=r"unknown key 'trainer.epoch'; did you mean 'epochs'\?"):
        load_config(["--config-dir", str(tmp_path), "trainer=mine"], "")


def test_a_users_own_yaml_is_found(tmp_path):
    (tmp_path / "model").mkdir()
    text = (ROOT / "conf/model/deepfm.yaml").read_text()
    (tmp_path / "model" / "small.yaml").write_text(text.replace("embedding_dim: 16", "embedding_dim: 4"))
    config = load_config(["--config-dir", str(tmp_path), "model=small"], "")
    assert config.model["embedding_dim"] == 4


def test_every_group_composes():
    for group in ("data", "model", "embedding", "optimizer", "trainer", "experiment"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert load_config([f"{group}={path.stem}"], "").trainer.batch_size > 0


def _leaf_fields(config, prefix=""):
    for item in fields(config):
        value = getattr(config, item.name)
        yield item.name
        if is_dataclass(value):
            yield from _leaf_fields(value)


def test_every_key_is_read():
    """Each key of the configuration is an attribute that some code outside the dataclasses' own module reads."""
    read = set()
    for folder in ("ctr", "distributed", "embedding", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    read.add(node.value)  # getattr(data, split)
    config = load_config([], "")
    assert isinstance(config, Config)
    unread = {name for name in _leaf_fields(config) if name not in read}
    assert not unread


def test_every_key_of_conf_is_commented():
    for path in (ROOT / "conf").rglob("*.yaml"):
        bare = OmegaConf.load(path)
        lines = path.read_text().splitlines()
        for key in bare:
            if key in ("defaults", "target") or isinstance(bare[key], DictConfig):
                continue
            line = next(i for i, text in enumerate(lines) if text.strip().startswith(f"{key}:"))
            above = lines[line - 1] if line else ""
            assert "#" in lines[line] or above.strip().startswith("#"), f"{path.name}: {key} has no comment"
