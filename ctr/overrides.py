"""Compose the overrides of a command line, `key=value`, with hydra.

Hydra reads a value by a grammar of its own, in which `=`, commas, quotes, `#`, `(` and letters outside of ASCII mean
something or nothing. Users write paths and dates. So a key that holds text takes the text as it was typed, and what
hydra cannot read otherwise becomes one line that names the key and says how to write the value.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tessera import conf
from tessera.ctr.renamed_keys import refuse_renamed
from tessera.ctr.table_overrides import TableOverride, split_off, with_overrides
from tessera.ctr.yaml_errors import NOT_YAML
from tessera.embedding.errors import ConfigError, did_you_mean

OVERRIDE = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<key>[^=]*)(?P<equals>=)?(?P<value>.*)", re.DOTALL)
FREE = ("model.", "numeric.")  # keys below are those of the yaml that was chosen, and may hold anything


def compose_overrides(overrides: Sequence[str], folders: Sequence[Path], schema: type) -> DictConfig:
    """Compose conf/ and the user's folders of yaml with overrides.

    schema: the dataclass of all keys. Each of them can be set, whether or not a yaml names it.

    Raises:
        ConfigError: naming the key and what to write instead.
    """
    search_path = [f"hydra.searchpath=[{','.join(_quoted(f'file://{folder}') for folder in folders)}]"]
    search_path = search_path if folders else []
    groups = {path.name for folder in (Path(conf.__file__).parent, *folders) for path in folder.iterdir()}
    keys = dict(keys_of(schema))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(Path(conf.__file__).parent.resolve()), version_base="1.3"):

        @cache
        def known() -> set[str]:
            """Return all keys of the chosen groups, those of the model's yaml included."""
            choices = [_ready(one, keys, groups, lambda: groups) for one in overrides if _key(one) in groups]
            return {*keys, *groups, *_names(compose("config", overrides=search_path + choices))}

        overrides, tables = split_off(overrides)
        try:
            ready = [_ready(override, keys, groups, known) for override in overrides]
            composed = compose("config", overrides=search_path + ready)
            return _with_tables(composed, tables) if tables else composed
        except (HydraException, OmegaConfBaseException) as error:
            with suppress(HydraException, OmegaConfBaseException):  # known() needs the choices, which may be at fault
                for override in overrides:
                    _check_free(override, known)
            raise ConfigError(_explain(error)) from None
        except NOT_YAML as error:
            raise ConfigError(f"a yaml that is read cannot be read as YAML: {_explain(error)}") from None


def _with_tables(composed: DictConfig, overrides: Sequence[TableOverride]) -> DictConfig:
    """Set what overrides say of single tables over what the yaml says."""
    with open_dict(composed):
        embedding = composed.setdefault("embedding", {})
        there = OmegaConf.to_object(OmegaConf.create(embedding.get("tables") or {}))
        assert isinstance(there, dict)
        embedding["tables"] = with_overrides(there, overrides)
    return composed


def keys_of(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the annotation of every key of a dataclass and of the dataclasses in it."""
    for name, annotation in typing.get_type_hints(schema).items():
        yield prefix + name, annotation
        if isinstance(annotation, type) and is_dataclass(annotation):
            yield from keys_of(annotation, f"{prefix}{name}.")


def _ready(override: str, keys: dict[str, Any], groups: set[str], known: Callable[[], set[str]]) -> str:
    """Return the override in the form in which hydra understands what the user meant."""
    parts = _parts(override)
    prefix, key, value = parts["prefix"] or "", parts["key"], parts["value"]
    if prefix == "~" or key.startswith("hydra.") or "@" in key:
        return override
    if not parts["equals"]:
        raise ConfigError(f"override {override!r} has no '='; expected key=value")
    refuse_renamed(key, value)
    annotation = keys.get(key)
    if annotation is None and key.startswith("embedding.formats."):
        annotation = str
    if key.startswith("data.days.") and key not in keys:
        annotation = Any
    if is_dataclass(annotation) and key not in groups and value[:1] != "{":
        raise ConfigError(f"{key} is {value} and holds several keys; expected one such as {_first(key, keys)}={value}")
    if annotation is not None and key not in groups:
        return f"++{key}={_value(key, value, _types(annotation))}"
    if key in groups:
        return f"{prefix}{key}={_choice(key, value)}"
    if not key.startswith(FREE):
        raise ConfigError(f"unknown key {key!r} in override {override!r}{did_you_mean(key, sorted(known()))}")
    return f"{prefix}{key}={_value(key, value, None)}"  # hydra refuses one that the chosen yaml does not name


def _choice(group: str, value: str) -> str:
    """Return the name of a group's yaml, or a list of names, as text: a file may be called 2024, and null is none."""
    parsed = _parse(value)
    found = parsed.value() if parsed and not parsed.is_sweep_override() else value
    if isinstance(found, list) and not all(isinstance(one, str | QuotedString) for one in found):
        raise ConfigError(f"{group} is {value}; expected the name of a yaml")
    if isinstance(found, dict):
        return _value(group, value, None)
    return _value(group, value, None) if isinstance(found, str | QuotedString | list) else _quoted(value)


def _check_free(override: str, known: Callable[[], set[str]]) -> None:
    """Raise ConfigError if a model's own key is not in its yaml and no prefix asks for it to be added."""
    parts = _parts(override)
    key = parts["key"]
    if key.startswith(FREE) and "@" not in key and not parts["prefix"] and key not in known():
        hint = f"{did_you_mean(key, sorted(known()))} (+{key}=... gives the key to a model whose yaml does not name it)"
        raise ConfigError(f"unknown key {key!r} in override {override!r}{hint}")


def _first(group: str, keys: dict[str, Any]) -> str:
    return next(key for key in keys if key.startswith(f"{group}."))


def _types(annotation: Any) -> set[Any]:
    """Return the types that an annotation admits: str | list[str] | None gives {str, list, NoneType}."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return {dict if is_dataclass(one) else typing.get_origin(one) or one for one in options}


def _value(key: str, value: str, admitted: set[Any] | None) -> str:
    """Return the value in hydra's grammar. `admitted` are the types that the key takes, None if anything."""
    parsed = _parse(value)
    if admitted is not None and str in admitted:
        if value == "" or (value == "null" and type(None) in admitted):
            return value
        has_quotes = value[0] in "'\"" and value[-1] == value[0]
        if parsed and ("${" in value or has_quotes):
            return value
        if list not in admitted or value[0] != "[":
            return _quoted(value)
    if value.startswith("[") and value.endswith("]") and not parsed and not set("'\"{") & set(value):
        value = f"[{','.join(_quoted(one.strip()) for one in value[1:-1].split(','))}]"
        parsed = _parse(value)
    if admitted is not None and not {list, dict} <= admitted:
        if dict in admitted and value.startswith("["):
            raise ConfigError(f'{key} is {value}; expected a mapping, written "{key}={{a: b}}"')
        if list in admitted and str not in admitted and value.startswith("{"):
            raise ConfigError(f'{key} is {value}; expected a list, written "{key}=[a,b]"')
    if parsed and not parsed.is_sweep_override():
        return value
    if parsed:
        raise ConfigError(
            f"{key} is {value}: a comma, or a function like range(..), would mean several runs (`tessera sweep` does "
            f'these); a list is written "{key}=[{value}]", a text "{key}=\'{value}\'"'
        )
    if admitted is not None and list not in admitted and dict not in admitted:
        return _quoted(value)  # the check of its type says what is expected
    if admitted is None and value[:1] not in ("[", "{"):
        return _quoted(value)
    raise ConfigError(
        f'{key} is {value}, which cannot be read as a list or a mapping; expected "{key}=[a,b]" or '
        f'"{key}={{a: b}}", with texts that hold other than letters, digits and /-_.: between single quotes'
    )


def _parse(value: str) -> Any:
    """Return hydra's override of a value, None if its grammar does not read it."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _parts(override: str) -> re.Match[str]:
    parts = OVERRIDE.fullmatch(override)
    assert parts is not None  # any text is a key, with or without the rest
    return parts


def _key(override: str) -> str:
    return _parts(override)["key"].partition("@")[0]


def _explain(error: Exception) -> str:
    """Return hydra's message as one line, with the nearest choice if a group has none of that name."""
    text = " ".join(str(error).split())
    option = re.search(r"Could not find '(\w+)/(\S+)' Available options in '\w+': (.*?) Config search path", text)
    if option:
        group, choice, options = option[1], option[2], option[3].split()
        hint = did_you_mean(choice, options, f"there are {', '.join(options)}")
        return f"no {group} {choice!r}{hint} (a yaml of your own: --config-dir)"
    return text


def _names(node: DictConfig, prefix: str = "") -> Iterable[str]:
    for name, value in node.items_ex(resolve=False):
        key = prefix + str(name)
        yield key
        if isinstance(value, DictConfig):
            yield from _names(value, f"{key}.")
