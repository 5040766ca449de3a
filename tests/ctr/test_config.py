"""The command line: defaults compose, mistakes are one line that names the nearest key."""

import ast
import copy
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import get_type_hints

import pytest
from omegaconf import DictConfig, OmegaConf

from tessera.ctr.config import Config, as_yaml, load_config
from tessera.ctr.config_checks import check
from tessera.ctr.config_help import choices, choices_and_keys, text_of
from tessera.embedding.errors import ConfigError
from tessera.embedding.settings import comment_of, default_of, rule_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["3", "null", "true", "1.5", "2024"])
def test_the_name_of_a_yaml_is_text_whatever_it_looks_like(tmp_path, name):
    with pytest.raises(ConfigError, match=f"no model '{name}'; there are afn, "):
        load_config([f"model={name}"], "")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / f"{name}.yaml").write_text("target: tessera.ctr.models.dnn.DNN\nname: mine\n")
    config = load_config(["--config-dir", str(tmp_path), f"model={name}", "data=synthetic", "data.path=x"], "")
    assert config.model["name"] == "mine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.btch_size=3"], "unknown key 'trainer.btch_size' in override 'trainer.btch_size=3'; "
                                  "did you mean 'trainer.batch_size'?"),
        (["modle=deepfm"], "unknown key 'modle' in override 'modle=deepfm'; did you mean 'model'?"),
        (["model=deepfmm"], "no model 'deepfmm'; did you mean 'deepfm'? (a yaml of your own: --config-dir)"),
        (["model=deepfmm", "model.hidden=[8]"],
         "no model 'deepfmm'; did you mean 'deepfm'? (a yaml of your own: --config-dir)"),
        (["data=[1,2]"], "data is [1,2]; expected the name of a yaml"),
        (["embedding.init=${a.b}"], "embedding.init: Interpolation key 'a.b' not found"),
        (["embedding.formats=[w]"],
         'embedding.formats is [w]; expected a mapping, written "embedding.formats={a: b}"'),
        (["trainer.warm_start.rename={a: b}"],
         'trainer.warm_start.rename is {a: b}; expected a list, written "trainer.warm_start.rename=[a,b]"'),
        (["trainer.batch_size=99999999999999999999"],
         "trainer.batch_size is 99999999999999999999; expected a whole number of at most 64 bits"),
        (["trainer.batch_size=abc"], "trainer.batch_size: Value 'abc' of type 'str' could not be converted to Integer"),
        (["trainer.batch_size=0"], "trainer.batch_size is 0; expected at least 1"),
        (["optimizer.sparse.lr=-1"], "optimizer.sparse.lr is -1.0; expected a number above 0"),
        (["embedding.format=int9"],
         "embedding.format is 'int9'; expected fp32, fp16, bf16, int8, int4 or int2; did you mean int8?"),
        (["embedding.formats={w: fp8}"],
         "embedding.formats.w is 'fp8'; expected fp32, fp16, bf16, int8, int4 or int2"),
        (["embedding.rounding=up"], "embedding.rounding is 'up'; expected stochastic or nearest"),
        (["embedding.scale=0"], "embedding.scale is 0.0; expected a number above 0"),
        (["embedding.range=-1"], "embedding.range is -1.0; expected a number above 0"),
        (["embedding.alpt.every=0"], "embedding.alpt.every is 0; expected at least 1"),
        (["embedding.alpt.gradient_scale=rows"],
         "embedding.alpt.gradient_scale is 'rows'; expected batch, dim or none"),
        (["optimizer.helen.rho=-1"], "optimizer.helen.rho is -1.0; expected at least 0"),
        (["optimizer.helen.xi=2"], "optimizer.helen.xi is 2.0; expected at least 0 and at most 1"),
        (["embedding.transport=int8"], "embedding.transport is 'int8'; expected fp32, fp16 or bf16"),
        (["embedding=static", "+embedding.format=int8"],
         "embedding.format is int8; static tables have fp32 alone (embedding=dynamic has more)"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
        (["data.path"], "override 'data.path' has no '='; expected key=value"),
        (["daily.skip=2026-11-01"], "daily.skip: expected a list, written \"daily.skip=[a,b]\""),
        (["trainer.seed=18446744073709551616"],
         "trainer.seed is 18446744073709551616; expected a whole number from 0 to 2^63 - 1"),
        (["trainer.seed=-1"], "trainer.seed is -1; expected a whole number from 0 to 2^63 - 1"),
        (["trainer.seed=1.5"], "trainer.seed: Value '1.5' of type 'float' could not be converted to Integer"),
        (["trainer.seed=true"], "trainer.seed: Value 'True' of type 'bool' could not be converted to Integer"),
        (["trainer.epochs=1=2"], "trainer.epochs: Value '1=2' of type 'str' could not be converted to Integer"),
        (["tränier.epochs=1"], "unknown key 'tränier.epochs' in override 'tränier.epochs=1'; did you mean "
                               "'trainer.epochs'?"),
        (["+data.lane=1"], "unknown key 'data.lane' in override '+data.lane=1'; did you mean 'data.lanes'?"),
        (["model.hiden=[1]"], "unknown key 'model.hiden' in override 'model.hiden=[1]'; did you mean 'model.hidden'? "
                              "(+model.hiden=... gives the key to a model whose yaml does not name it)"),
        (["model.hidden=[1,2"], "model.hidden is [1,2, which cannot be read as a list or a mapping; expected "
                                "\"model.hidden=[a,b]\" or \"model.hidden={a: b}\", with texts that hold other than "
                                "letters, digits and /-_.: between single quotes"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(overrides, "")
    assert str(error.value) == message


@pytest.mark.parametrize(
    "override", ["model.hidden=1,2", "trainer.epochs=1,2", "model=deepfm,ipnn", "trainer.epochs=range(1,3)"]
)
def test_what_hydra_takes_for_several_runs_names_the_key_and_the_remedy(override):
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as error:
        load_config([override], "")
    assert str(error.value).startswith(f"{key} is {value}: a comma, or a function like range(..), would mean several")
    assert f'a list is written "{key}=[{value}]"' in str(error.value)


TEXTS = [
    "/data/dt=2026-11-01", "/data/a,b", "/data/日本/é", "/data/a b", "/d/$x", "it's", 'say "a"', "/d/[a]", "[a", "{a",
    "(a)", "s3://b/x?y=1&z=2", "1_000", "1e3", "true", "2026", "a#b", "~/x", "a\\'b", "c:\\d\\", "range(1,3)", "%x*y!",
]  # fmt: skip


def test_a_configuration_is_written_as_omegaconf_writes_it():
    config = load_config(["data=ml100k", "data.test=null", "embedding.formats={w: int8}"], "")
    texts = [
        *TEXTS,
        "",
        "y",
        "No",
        "on",
        "null",
        "~",
        "0x1F",
        "1:30",
        ".5",
        "nan",
        "-inf",
        " a ",
        "a: b",
        "- a",
        "é\n",
        "x " * 99,
    ]
    config.model |= {"texts": texts, **{text: text for text in texts if text}, "numbers": [1, 1e-7, float("inf"), None]}
    assert as_yaml(config) == OmegaConf.to_yaml(asdict(config), resolve=True)


@pytest.mark.parametrize("text", TEXTS)
def test_a_key_that_holds_text_takes_the_text_as_typed(text):
    config = load_config([f"data.path={text}", f"trainer.run_dir={text}", "data.test=null"], "")
    assert config.data.path == config.trainer.run_dir == text and config.data.test is None


def test_text_in_hydras_own_quotes_and_interpolations_mean_what_they_did():
    config = load_config(["data.path='/data/a,b'", 'trainer.run_dir="null"', "data.name=${data.path}=1"], "")
    assert config.data.path == "/data/a,b" and config.trainer.run_dir == "null" and config.data.name == "/data/a,b=1"


def test_a_models_own_keys_take_text_that_hydra_cannot_read():
    assert load_config(["+model.name=dt=é"], "").model["name"] == "dt=é"


def test_lists_of_text_take_dates_and_what_hydra_cannot_read():
    assert load_config(["daily.skip=[2026-11-01,dt=é]"], "").daily.skip == ["2026-11-01", "dt=é"]
    assert load_config(["daily.skip=['a,b',c]"], "").daily.skip == ["a,b", "c"]


def test_every_key_can_be_overridden_whether_or_not_the_yaml_names_it(tmp_path):
    for group in ("data", "trainer"):
        (tmp_path / group).mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: mine\npath: /data\nschema: {features: []}\n")
    (tmp_path / "trainer" / "mine.yaml").write_text("epochs: 2\n")
    mine = ["--config-dir", str(tmp_path), "data=mine", "trainer=mine"]
    keys = ["data.lanes=4", "data.schema.time=t", "trainer.amp=true", "embedding.formats.w=int8"]
    config = load_config([*mine, *keys], "")
    assert (config.data.lanes, config.data.schema.time, config.trainer.amp) == (4, "t", True)
    assert config.embedding.formats == {"w": "int8"} and config.trainer.shuffle
    with pytest.raises(ConfigError, match=r"unknown key 'data.lane' in .* did you mean 'data.lanes'\?"):
        load_config([*mine, "data.lane=4"], "")


def test_unknown_key_in_a_users_own_yaml(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text("epoch: 2\n")
    with pytest.raises(ConfigError, match=r"unknown key 'trainer.epoch'; did you mean 'epochs'\?"):
        load_config(["--config-dir", str(tmp_path), "trainer=mine"], "")


def test_a_users_own_yaml_is_found(tmp_path):
    (tmp_path / "model").mkdir()
    text = (ROOT / "conf/model/deepfm.yaml").read_text()
    (tmp_path / "model" / "small.yaml").write_text(text.replace("embedding_dim: 16", "embedding_dim: 4"))
    config = load_config(["--config-dir", str(tmp_path), "model=small"], "")
    assert config.model["embedding_dim"] == 4


def test_every_choice_composes():
    """A choice of each group at a time, until all had their turn. Those experiments whose data set has a published
    split are composed by tests/ctr/data/convert/test_published.py."""
    found = choices()
    published = tuple(f"{path.stem}_" for path in (ROOT / "conf/prepare").glob("*.yaml"))
    experiments = [name for name in found.pop("experiment") if not name.startswith(published)]
    for place in range(max(map(len, found.values()))):
        chosen = [f"{group}={names[place % len(names)]}" for group, names in found.items()]
        assert load_config(chosen, "").trainer.batch_size > 0
    for name in experiments:
        assert load_config([f"experiment={name}"], "").trainer.batch_size > 0
    assert experiments


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


def _settings(kind=Config, prefix=""):
    """Dotted name and field of every key that the command line knows."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _settings(hints[field.name], f"{prefix}{field.name}.")
        elif prefix:
            yield f"{prefix}{field.name}", field


SETTINGS = dict(_settings())


@pytest.mark.parametrize("group", ["embedding", "optimizer", "trainer", "daily"])
def test_no_yaml_repeats_a_default(group):
    for path in (ROOT / "conf" / group).glob("*.yaml"):
        for key, value in _leaves(OmegaConf.to_container(OmegaConf.load(path)), f"{group}."):
            assert value != default_of(SETTINGS[key]), f"{path.name} repeats the default of {key}"


def _leaves(node: dict, prefix: str):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_a_users_own_yaml_may_leave_everything_out(tmp_path):
    groups = ("embedding", "optimizer", "trainer", "daily")
    for group in groups:
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text("")
    mine = load_config(["--config-dir", str(tmp_path), *(f"{group}=mine" for group in groups)], "")
    assert mine == load_config([], "")
    assert (mine.embedding.kind, mine.optimizer.sparse.name, mine.trainer.batch_size) == ("dynamic", "adam", 4096)


def test_every_key_can_be_set_to_what_help_shows():
    own = ("data.name", "data.path", "data.schema.features")  # each data set has its own
    shown = [f"{key}={text_of(default_of(field))}" for key, field in SETTINGS.items() if key not in own]
    config, plain = load_config(shown, ""), load_config([], "")
    plain.data.schema.time = None  # which the synthetic data have
    plain.export.check = "always"  # which tests leave out (tests/composing.py)
    assert config == plain


def test_every_key_says_what_it_means():
    assert len(SETTINGS) > 100
    assert not [key for key, field in SETTINGS.items() if len(comment_of(field).split()) < 2]


def test_help_has_every_key_with_its_default_and_meaning():
    lines = [" ".join(line.split()) for line in choices_and_keys(Config).split("\n\n")]
    text = " ".join(lines)
    for key, field in SETTINGS.items():
        name = {"first": "from", "last": "to"}.get(field.name, field.name)
        assert f" {name}={text_of(default_of(field))} {comment_of(field)}" in text, key


def _refused(key):
    """Values that a key does not take by its rule, with what is said of them."""
    rule = rule_of(SETTINGS[key])
    if rule.choices:
        yield "nonsense", f"is 'nonsense'; expected {rule.choices[0]}"
    bounds = [(rule.at_least, -1), (rule.above, 0), (rule.below, 0), (rule.at_most, 1)]
    for bound, step in bounds:
        if bound is not None:
            yield bound + step, f"is {bound + step}"
    if "float" in SETTINGS[key].type and any(bound is not None for bound, _ in bounds):
        yield float("inf"), "is inf; expected "
        yield float("nan"), "is nan; expected "


@pytest.fixture(scope="module")
def plain() -> Config:
    return load_config([], "")


@pytest.mark.parametrize("key", [key for key in SETTINGS if any(_refused(key))])
def test_a_value_that_a_key_does_not_take_is_one_line_that_names_it(plain, key):
    for value, message in _refused(key):
        changed = copy.deepcopy(plain)
        *groups, name = key.split(".")
        of_mapping = key == "embedding.formats"
        setattr(reduce(getattr, groups, changed), name, {"w": value} if of_mapping else value)
        with pytest.raises(ConfigError) as error:
            check(changed)
        found = str(error.value)
        assert found.startswith(f"{key}{'.w' * of_mapping} {message}") and "\n" not in found
