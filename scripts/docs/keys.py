"""Build the page of every key: those of conf/ and of the data schema, with types, defaults and comments from the
code."""

from __future__ import annotations

import html
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml
from hydra.utils import get_class
from omegaconf import MISSING, OmegaConf

from tessera.ctr.config import Config, load_config
from tessera.ctr.config_help import text_of
from tessera.ctr.data.convert.csv import CsvConfig
from tessera.ctr.data.labels import LabelConfig
from tessera.ctr.data.schema import SchemaConfig
from tessera.ctr.table_settings import TableSettings
from tessera.embedding.settings import comment_of, default_of
from tessera.scripts.docs.comments import of_dataclass, of_yaml

CONF = Path(__file__).resolve().parents[2] / "conf"
#: Groups whose keys differ from file to file, because each file names a class of its own.
OPEN_GROUPS = ("model", "numeric")
INTRODUCTION = """# Every key

What stands here is read from the code and from `conf/` when this page is built. `tessera train --help`
lists keys, defaults and meaning in the terminal.

A key is set on the command line, `trainer.epochs=3`, or in yaml of your own that is laid out as `conf/` and named by
`--config-dir`. A group is chosen by the name of one of its files, `model=dcn_v2`. Lists are written `"[a,b]"` and
mappings `"{a: b}"`, in quotes because of the shell. `null` means: not set. `--cfg` prints what a command would run
with.

"""


#: What is said below the heading of what is no group.
CSV = (
    "The yaml file of the converter for any delimited text (docs/data.md). It is a file of its own, not a group: its "
    "keys are not given on the command line."
)


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, type and default as text, what its comment says ('' without one), and its place."""

    name: str
    type: str
    default: str
    comment: str
    anchor: str = ""


@dataclass(frozen=True)
class Section:
    """Keys that are written below one heading."""

    title: str
    level: int
    comment: str
    keys: list[Key]


def sections() -> Iterator[Section]:
    """Return all sections of the page, in order."""
    composed = load_config([], "")
    yield Section("Groups", 2, "Each group is a folder of conf/, each choice a file in it.", list(_groups()))
    for field in fields(Config):
        if field.name in OPEN_GROUPS:
            yield from _open_group(field.name)
        else:
            kind = type(getattr(composed, field.name))
            yield from _of_dataclass(field.name, kind, _docstring(kind), composed, 2)
        if field.name == "embedding":
            yield from _of_tables()
    yield from _of_dataclass("prepare csv", CsvConfig, CSV, None, 2, prefix="")
    yield Section("Experiments", 2, "Choices that belong together: experiment=NAME.", list(_files("experiment")))


def page() -> str:
    """Return the page as markdown."""
    return INTRODUCTION + "\n".join(_written(section) for section in sections())


def _defaults() -> list[dict[str, str | None]]:
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return [one for one in listed if isinstance(one, dict)]


def _groups() -> Iterator[Key]:
    comments = dict(re.findall(r"- (\w+): \S+ +# (.*)", (CONF / "config.yaml").read_text()))
    for one in _defaults():
        for group, choice in one.items():
            names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            shown = f": {', '.join(names)}" if group != "experiment" else f" ({len(names)} files, below)"
            yield Key(group, "one of", "null" if choice is None else choice, comments.get(group, "") + shown)


def _files(group: str) -> Iterator[Key]:
    for path in sorted((CONF / group).glob("*.yaml")):
        yield Key(path.stem, "experiment", f"{group}={path.stem}", of_yaml(path)[0])


def _of_dataclass(
    title: str, kind: type, heading: str, composed: Any, level: int, prefix: str | None = None
) -> Iterator[Section]:
    """Yield the section of a dataclass, then those of the dataclasses in it.

    heading: said below the title. composed: the default configuration, for values that the dataclass leaves to yaml;
    None: there is none. prefix: what stands before the keys, if not the title.
    """
    prefix = f"{title}." if prefix is None else prefix
    beside, hints = of_dataclass(kind), typing.get_type_hints(kind)
    keys, inner = [], []
    for field in fields(kind):
        comment = comment_of(field) or beside.get(field.name, "")
        part = _dataclass_in(hints[field.name])
        if part is not None:
            is_list = typing.get_origin(hints[field.name]) is list
            inner.append((f"{prefix}{field.name}" + "[]" * is_list, part, _docstring(part) if is_list else comment))
            continue
        default = _default(field, None if "[]" in prefix else composed, prefix)
        anchor = f"{prefix or 'prepare.'}{field.name}"
        keys.append(Key(prefix + field.name, _type_name(hints[field.name]), default, comment, anchor))
    yield Section(title, level, heading, keys)
    if kind is SchemaConfig:  # a label is its name alone, or a mapping
        inner.insert(0, (f"{prefix}labels[]", LabelConfig, _docstring(LabelConfig)))
    for name, part, said in inner:
        yield from _of_dataclass(name, part, said or _docstring(part), composed, 3)


def _of_tables() -> Iterator[Section]:
    """Yield the sections of the keys of one table, whose defaults are the values of all tables."""
    for one in _of_dataclass("embedding.tables.TABLE", TableSettings, _docstring(TableSettings), None, 3):
        keys = [replace(key, default="that of all tables") for key in one.keys]
        yield replace(one, keys=keys)


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that a type is, or that its list elements are."""
    inside = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
    return inside if is_dataclass(inside) and isinstance(inside, type) else None


def _default(field: Any, composed: Any, prefix: str) -> str:
    value = default_of(field)
    if value == MISSING or value is NO_DEFAULT:
        if composed is None:
            return "must be given"
        value = OmegaConf.select(OmegaConf.structured(composed), prefix + field.name)
    return text_of(value)


def _type_name(hint: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "text or list"}
    if hint in names:
        return names[hint]
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return " or ".join(_type_name(one) for one in inside if one is not NoneType) + ", or null"
    if origin is list:
        return f"list of {_type_name(inside[0])}s".replace("texts", "text").replace("list of text or lists", "list")
    return "mapping" if origin is dict else getattr(hint, "__name__", str(hint))


def _open_group(group: str) -> Iterator[Section]:
    """Yield the sections of a group whose files name classes: one per file."""
    chosen = {name: choice for one in _defaults() for name, choice in one.items()}[group]
    yield Section(group, 2, f"Each file names a class and gives its arguments; the default is {group}={chosen}.", [])
    for path in sorted((CONF / group).glob("*.yaml")):
        values, comments = _open_file(path)
        target = get_class(values.pop("target"))
        keys = [
            Key(f"{group}.{key}", _type_of(value), text_of(value), comments.get(key, ""), f"{group}.{path.stem}.{key}")
            for key, value in values.items()
        ]
        yield Section(f"{group}={path.stem}", 3, of_yaml(path)[0] or _docstring(target), keys)


def _open_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return values and comments of the keys of a file that names a class, with those of the files beside it that it
    builds on."""
    loaded = yaml.safe_load(path.read_text())
    values: dict[str, Any] = {}
    comments: dict[str, str] = {}
    for other in loaded.pop("defaults", []):
        if isinstance(other, str) and other != "_self_":
            more_values, more_comments = _open_file(path.with_name(f"{other}.yaml"))
            values, comments = values | more_values, comments | more_comments
    return values | loaded, comments | of_yaml(path)[1]


def _type_of(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "list"
    return _type_name(type(value))


def _docstring(kind: type) -> str:
    """Return the docstring of a class; '' if it has none of its own, but one that `dataclass` has made."""
    text = inspect.getdoc(kind) or ""
    return "" if text.startswith(f"{kind.__name__}(") else text


def _written(section: Section) -> str:
    said = " ".join(section.comment.partition("\n\n")[0].split())
    lines = [f"{'#' * section.level} {section.title}", "", _escaped(said), ""]
    if section.keys:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in section.keys:
        place = key.anchor or key.name
        default = html.escape(key.default).replace("|", "&#124;")
        named = f'<span id="{place}"></span>`{key.name}`'
        lines.append(f"| {named} | {key.type} | <code>{default}</code> | {_escaped(key.comment)} |")
    return "\n".join(lines) + "\n"


def _escaped(comment: str) -> str:
    """Return a comment as markdown that shows it letter by letter, with links to the pages that it names."""
    text = html.escape(comment, quote=False)
    for sign in "|*_[]`^~":
        text = text.replace(sign, f"&#{ord(sign)};")
    return re.sub(r"docs/([a-z]+(?:&#95;[a-z]+)*)\.md", _link, text)


def _link(found: re.Match[str]) -> str:
    name = found[1].replace("&#95;", "_")
    return f"[{name.replace('_', ' ')}](../{name}.md)"
