"""List the choices and keys of a command line: the choices of each group of `conf/`, and every key with its default and
what it means."""

from __future__ import annotations

import re
import shutil
import textwrap
import typing
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING as UNSET
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from tessera import conf
from tessera.ctr.overrides import keys_of
from tessera.ctr.table_settings import keys_of_table
from tessera.embedding.settings import comment_of, default_of

COLUMN = 27  # where the meaning of a key begins

#: Keys that are written otherwise, as `from` is no name in Python.
WRITTEN = {"daily.first": "daily.from", "daily.last": "daily.to"}


def choices() -> dict[str, list[str]]:
    """Return the names of the yaml files of each group of `conf/` ("model")."""
    others = ("prepare", "tune")  # which are no groups: their commands read them
    folders = sorted(path for path in Path(conf.__file__).parent.iterdir() if path.name not in others)
    found = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
    return {group: names for group, names in found.items() if names}


def keys_by_group(schema: type) -> dict[str, list[str]]:
    """Return the names of the keys that hold values, by dotted prefix ("trainer.checkpoint").

    schema: the dataclass of all keys.
    """
    found = defaultdict(list)
    for key, annotation in keys_of(schema):
        group, _, name = WRITTEN.get(key, key).rpartition(".")
        if group and not is_dataclass(annotation):
            found[group].append(name)
    return dict(found)


def choices_and_keys(schema: type) -> str:
    """Return the choices, and the keys with their defaults and comments, as text as wide as the terminal."""
    lines = ["choices, one of each group (model=deepfm):"]
    lines += [_wrapped(f"  {group}= ", " ".join(names), 6) for group, names in choices().items()]
    lines += ["", "keys by group (trainer.epochs=2), with defaults and meaning; --cfg prints the values of a command:"]
    for field in fields(schema):
        kind = typing.get_type_hints(schema)[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            lines += _listed(kind, field.name, comment_of(field))
        if field.name == "embedding":
            own = "what one table has otherwise (embedding.tables.user_id.ttl_days=30): "
            lines += ["", _wrapped("  embedding.tables.TABLE: ", own + ", ".join(keys_of_table()), 6)]
    return "\n".join(lines) + "\n"


def _listed(kind: type, group: str, comment: str) -> Iterator[str]:
    """Yield the lines of a group of keys, then those of the groups in it."""
    yield f"\n  {group}: {comment}"
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        if not is_dataclass(hints[field.name]):
            name = WRITTEN.get(f"{group}.{field.name}", field.name).rpartition(".")[2]
            yield _wrapped(f"    {f'{name}={text_of(default_of(field))}':{COLUMN}} ", comment_of(field), COLUMN + 5)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _listed(hints[field.name], f"{group}.{field.name}", comment_of(field))


def text_of(value: Any) -> str:
    """Return a default as it would stand in yaml; `...` if it must be given."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if value is UNSET or value == MISSING:
        return "..."
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else f'"{value}"'.replace("\t", "\\t")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {text_of(one)}" for key, one in value.items()) + "}"
    return str(value)


def _wrapped(title: str, text: str, indent: int) -> str:
    width = max(60, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent=title, subsequent_indent=" " * indent)
