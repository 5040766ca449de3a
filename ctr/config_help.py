"""List the choices and keys of a command line: the choices of each group of `conf/`, and every key."""

from __future__ import annotations

import shutil
import textwrap
from collections import defaultdict
from dataclasses import is_dataclass
from pathlib import Path

from tessera import conf
from tessera.ctr.overrides import keys_of

#: Keys that are written otherwise, as `from` is no name in Python.
WRITTEN = {"daily.first": "daily.from", "daily.last": "daily.to"}


def choices() -> dict[str, list[str]]:
    """Return the names of the yaml files of each group of `conf/` ("model")."""
    folders = sorted(path for path in Path(conf.__file__).parent.iterdir() if path.name != "prepare")
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
    """Return the choices and the keys as text, as wide as the terminal."""
    lines = ["choices, one of each group (model=deepfm):"]
    lines += [_wrapped(f"{group}=", names) for group, names in choices().items()]
    lines += ["", "keys by group (trainer.epochs=2); what they mean stands in conf/ and, with --cfg, their values:"]
    lines += [_wrapped(f"{group}.", names) for group, names in keys_by_group(schema).items()]
    return "\n".join(lines) + "\n"


def _wrapped(title: str, names: list[str]) -> str:
    width = max(60, shutil.get_terminal_size().columns)
    return textwrap.fill(" ".join(names), width, initial_indent=f"  {title} ", subsequent_indent=" " * 6)
