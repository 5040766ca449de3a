"""Compose configurations with less work: tests make thousands, most of them as another one but for its folders.

Hydra parses all yaml of conf/ again for each, merges it and has types checked, a quarter of what a small job takes.
That these ways give what it gives is what tests/test_composing.py finds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from tessera import conf
from tessera.ctr import config as configuration
from tessera.ctr import overrides as command_line
from tests import COMPOSED

ALWAYS_THERE = {f"file://{Path(conf.__file__).parent.resolve()}", "pkg://hydra.conf", "structured://"}
GROUPS = {path.name for path in Path(conf.__file__).parent.iterdir()}
#: An override of a value, as `compose_overrides` writes it for hydra: it names no group and no package.
VALUE = re.compile(r"(\+\+|\+)?(?P<key>[^=@~+][^=@]*)=(?!\{)", re.ASCII)
FOLDER = re.compile(r"(?P<key>[a-z_.]+=)(?P<path>/[\w./-]+)", re.ASCII)


def compose_with_less_work() -> None:
    read_yaml_by_c()
    parse_once()
    values_last()
    compose_once()
    check_no_export()


def parse_once() -> None:
    """Keep what is parsed in this process. Folders of a test's own are read each time."""
    load, kept = ConfigRepository.load_config, {}

    def load_once(repository: ConfigRepository, config_path: str):
        if not {source.full_path() for source in repository.sources} <= ALWAYS_THERE:
            return load(repository, config_path)
        if config_path not in kept:
            kept[config_path] = pickle.dumps(load(repository, config_path))
        return pickle.loads(kept[config_path])

    ConfigRepository.load_config = load_once


def read_yaml_by_c() -> None:
    """Read yaml by its library in C, six times as fast. What that cannot read is read again, for Python's words."""
    load = yaml.load

    @wraps(load)
    def load_by_c(stream: Any, Loader: type) -> Any:
        text = stream.read() if hasattr(stream, "read") else stream
        try:
            return load(text, _in_c(Loader))
        except Exception:
            if hasattr(stream, "seek"):
                stream.seek(0)
                return load(stream, Loader)
            return load(text, Loader)

    yaml.load = load_by_c


def _in_c(loader: type) -> type:
    if not hasattr(yaml, "CSafeLoader") or not issubclass(loader, yaml.SafeLoader):
        return loader

    def __init__(self: Any, stream: Any) -> None:
        yaml.cyaml.CParser.__init__(self, stream)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)

    return type(loader.__name__, (yaml.cyaml.CParser, loader), {"__init__": __init__})


def values_last() -> None:
    """Compose what a command line chooses of groups once, and set its values in a copy, as hydra does afterwards.

    Once with the types of all keys, too, and once without, for values that are set in both.
    """
    compose, merge = command_line.compose, OmegaConf.unsafe_merge

    @wraps(compose)
    def compose_choices_once(name: str, overrides: Sequence[str]) -> DictConfig:
        values = [one for one in overrides if is_value(one)]
        choices = tuple(one for one in overrides if not is_value(one))
        if any(one.startswith(("hydra.", "~")) or "={" in one for one in overrides):
            return compose(name, overrides=list(overrides))  # what is taken away, or a mapping over what is none
        try:
            made = _with_plain_choices(choices, lambda rest: _chosen(compose, name, rest))
            ConfigLoaderImpl._apply_overrides_to_config([_parsed(one) for one in values], made)
        except Exception:  # which words it has is hydra's
            return compose(name, overrides=list(overrides))
        made.__dict__["_tests_values"] = name, choices, values, _tables_of(made)
        return made

    @wraps(merge)
    def merge_choices_once(*configs: DictConfig) -> DictConfig:
        composed = configs[-1]
        name, choices, values, tables = composed.__dict__.get("_tests_values", (None, (), (), None))
        if name is None or _tables_of(composed) is not tables or not {_key(one) for one in values} <= _keys():
            return merge(*configs)  # tables are set in what is composed, and some keys are of no dataclass
        try:
            made = _with_plain_choices(choices, lambda rest: _merged(compose, merge, name, rest))
            ConfigLoaderImpl._apply_overrides_to_config([_parsed(one) for one in values], made)
        except Exception:
            return merge(*configs)
        return made

    command_line.compose = compose_choices_once
    OmegaConf.unsafe_merge = staticmethod(merge_choices_once)


def is_value(override: str) -> bool:
    found = VALUE.match(override)
    return found is not None and found["key"] not in GROUPS


def _key(override: str) -> str:
    found = VALUE.match(override)
    assert found is not None
    return found["key"]


@cache
def _keys() -> set[str]:
    return {key for key, _ in command_line.keys_of(configuration.Config)}


def _with_plain_choices(choices: tuple[str, ...], made: Callable[[tuple[str, ...]], bytes]) -> DictConfig:
    """What is made of the choices: of all but a model and a numeric, which then take the place of the default's."""
    plain = (
        {}
        if any("@" in one or "experiment" in one for one in choices)
        else {
            group: path
            for group, path in ((one.partition("=")[0], _plain_yaml(one)) for one in choices)
            if path and sum(one.startswith(f"{group}=") for one in choices) == 1
        }
    )
    config = pickle.loads(made(tuple(one for one in choices if one.partition("=")[0] not in plain)))
    for group, path in plain.items():
        OmegaConf.update(config, group, OmegaConf.to_container(OmegaConf.load(path)), merge=False, force_add=True)
    return config


@cache
def _plain_yaml(choice: str) -> Path | None:
    """The yaml of a model or of a numeric if that is all that the choice brings."""
    found = re.fullmatch(r"(model|numeric)=(\w+)", choice)
    path = Path(conf.__file__).parent / found[1] / f"{found[2]}.yaml" if found else None
    if path is None or not path.is_file() or re.search("^defaults:|@package", path.read_text(), re.MULTILINE):
        return None
    return path


@cache
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


@cache
def _chosen(compose: Callable, name: str, choices: tuple[str, ...]) -> bytes:
    return _kept(("chosen", name, choices), lambda: compose(name, overrides=list(choices)))


@cache
def _merged(compose: Callable, merge: Callable, name: str, choices: tuple[str, ...]) -> bytes:
    def made() -> DictConfig:
        return merge(deepcopy(configuration._schema()), pickle.loads(_chosen(compose, name, choices)))

    return _kept(("merged", name, choices), made)


def _kept(key: object, make: Callable[[], Any]) -> bytes:
    """What `make` gives, pickled; made once by all processes of this run of pytest."""
    shared = Path(os.environ.get(COMPOSED, os.devnull))
    path = shared / hashlib.sha256(repr(key).encode()).hexdigest()
    if path.exists():
        return path.read_bytes()
    made = pickle.dumps(make())
    if shared.is_dir():
        with tempfile.NamedTemporaryFile(dir=shared, delete=False) as file:
            file.write(made)
        os.replace(file.name, path)
    return made


def _tables_of(composed: DictConfig) -> Any:
    embedding = composed.__dict__["_content"].get("embedding")
    return embedding.__dict__["_content"].get("tables") if isinstance(embedding, DictConfig) else None


def compose_once() -> None:
    """Keep each configuration that is composed, for all processes of this run of pytest.

    A command line that differs from an earlier one only in folders is that one with other folders, whose names no key
    but their own depends on. What is refused is composed again each time.
    """
    compose = configuration.config_of

    @wraps(compose)
    def compose_or_read(options: argparse.Namespace) -> configuration.Config:
        if options.config_dir or options.cfg or not Path(os.environ.get(COMPOSED, os.devnull)).is_dir():
            return compose(options)
        folders: list[str] = []
        keyed = [_without_folder(one, folders) for one in options.overrides]
        given, options.overrides = options.overrides, keyed
        try:
            made = _kept(keyed, lambda: compose(options))
        except Exception:
            if not folders:
                raise
            options.overrides = given
            return compose(options)
        return _with_folders(pickle.loads(made), folders)

    configuration.config_of = compose_or_read


def check_no_export() -> None:
    """Have no job export its model before the first step unless it says `export.check`: a second of each. What users
    get is the default, which tests of the check take."""
    compose = configuration.config_of

    @wraps(compose)
    def compose_unchecked(options: argparse.Namespace) -> configuration.Config:
        made = compose(options)
        if not any(one.startswith("export.check=") for one in options.overrides):
            made.export.check = "never"
        return made

    configuration.config_of = compose_unchecked


def _without_folder(override: str, folders: list[str]) -> str:
    found = FOLDER.fullmatch(override)
    if found is None:
        return override
    folders.append(found["path"])
    return f"{found['key']}/folder-{len(folders) - 1}-of-a-test"


def _with_folders(value: Any, folders: list[str]) -> Any:
    if isinstance(value, str):
        return re.sub(r"/folder-(\d+)-of-a-test", lambda found: folders[int(found[1])], value)
    if is_dataclass(value):
        for field in fields(value):
            setattr(value, field.name, _with_folders(getattr(value, field.name), folders))
    elif isinstance(value, dict):
        return {key: _with_folders(one, folders) for key, one in value.items()}
    elif isinstance(value, list):
        return [_with_folders(one, folders) for one in value]
    return value
