"""Read overrides of single tables, `embedding.tables.<table>.<key>=<value>`.

Tables are called as their features are, and columns are called anything: hydra's grammar has no words for most names.
So what is below `embedding.tables` is read here, and values are read as YAML. The key is taken from the end, where only
known ones can stand; so names may hold dots. One that holds an equals sign stands between quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from tessera.ctr.table_settings import SECTIONS, keys_of_table
from tessera.ctr.yaml_errors import NOT_YAML
from tessera.embedding.errors import ConfigError, did_you_mean

PREFIX = "embedding.tables"
QUOTED = re.compile(r"""(['"])(?P<name>.*?)\1(?:\.(?P<key>[^=]*))?=(?P<value>.*)""", re.DOTALL)


class TableOverride(NamedTuple):
    """What an override sets of one table. key: ("admission", "kind"); () for all of the table."""

    table: str
    key: tuple[str, ...]
    value: Any


def split_off(overrides: Sequence[str]) -> tuple[list[str], list[TableOverride]]:
    """Return the overrides that are none of single tables, and what the others set.

    Raises:
        ConfigError: one line, for a key that no table has or a value that is no YAML.
    """
    rest, found = [], []
    for override in overrides:
        plain = override.removeprefix("++").removeprefix("+")
        if plain.startswith(f"{PREFIX}."):
            found.append(_of_one(override, plain.removeprefix(f"{PREFIX}.")))
        elif plain.startswith(f"{PREFIX}={{"):
            tables = _read(PREFIX, plain.removeprefix(f"{PREFIX}="))
            found += [TableOverride(str(name), (), given) for name, given in tables.items()]
        else:
            rest.append(override)
    return rest, found


def with_overrides(tables: Mapping[Any, Any], overrides: Sequence[TableOverride]) -> dict[str, Any]:
    """Return `embedding.tables` with what a command line sets, in its order."""
    found = {str(name): given for name, given in tables.items()}
    for table, key, value in overrides:
        held = found.get(table)
        found[table] = _set(held if isinstance(held, dict) else {}, key, value)
    return found


def _set(held: Mapping[str, Any], key: Sequence[str], value: Any) -> Any:
    """Return a mapping with the value below a key; the value itself without a key."""
    if not key:
        return value
    below = held.get(key[0])
    if isinstance(below, str) and len(key) > 1:
        below = {"name": below}  # of an optimizer, which alone stands for the mapping
    return {**held, key[0]: _set(below if isinstance(below, dict) else {}, key[1:], value)}


def _of_one(override: str, text: str) -> TableOverride:
    """Read what stands behind the prefix: "user_id.admission.kind=exact"."""
    quoted = QUOTED.fullmatch(text)
    if quoted is not None:
        name, key, value = quoted["name"], quoted["key"] or "", quoted["value"]
    else:
        where, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no '='; expected key=value")
        name, key = _split(where, whole=value[:1] == "{")
    if key and key not in keys_of_table():
        section, _, last = key.rpartition(".")
        known = [one.rpartition(".")[2] for one in keys_of_table() if one.rpartition(".")[0] == section]
        hint = did_you_mean(last, known, f"known: {', '.join(known)}")
        raise ConfigError(f"unknown key {PREFIX + '.' + name + '.' + key!r} in override {override!r}{hint}")
    whole = f"{PREFIX}.{name}.{key}" if key else f"{PREFIX}.{name}"
    return TableOverride(name, tuple(key.split(".")) if key else (), _read(whole, value))


def _split(where: str, *, whole: bool) -> tuple[str, str]:
    """Return the table and the key in it of "user_id.admission.kind". whole: a mapping follows, so that there may be no
    key."""
    of_section = re.fullmatch(rf"(.+)\.((?:{'|'.join(SECTIONS)})\.[^.]+)", where)
    if of_section is not None:
        return of_section[1], of_section[2]
    name, _, key = where.rpartition(".")
    if not name or (whole and key not in keys_of_table()):
        return where, ""
    return name, key


def _read(key: str, value: str) -> Any:
    try:
        read = yaml.safe_load(value)
        json.dumps(read, default=str, skipkeys=True)  # ValueError: an anchor names what it lies in
        return read
    except NOT_YAML:
        raise ConfigError(f'{key} is {value}, which is no YAML; expected a value, or "{{a: b}}"') from None
