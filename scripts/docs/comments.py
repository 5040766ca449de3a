"""Find the comments that explain keys: beside the fields of a dataclass, and beside the keys of a yaml file."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

KEY = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<value>.*?)(?:\s+#\s*(?P<comment>.*))?$")
FIELD = re.compile(r"^ {4}(?P<key>\w+): ")


def of_yaml(path: Path) -> tuple[str, dict[str, str]]:
    """Return the comment at the top of a yaml file, and dotted key -> its comment ('' if it has none).

    A key's comment stands behind it and goes on in comment lines below that are indented further; a key without
    one takes the comment lines above it. Keys inside of `[...]`, `{...}` and lists are not looked at.
    """
    lines = path.read_text().splitlines()
    top: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            top.append(line.removeprefix("#").strip())
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    last: str | None = None
    for line in lines[len(top) :]:
        text = line.strip()
        if text.startswith("#"):
            indent = len(line) - len(line.lstrip())
            if last is not None and parents and indent > parents[-1][0] + len(parents[-1][1]):
                found[last] = f"{found[last]} {text.removeprefix('#').strip()}".strip()
            else:
                above.append(text.removeprefix("#").strip())
            continue
        match = KEY.match(line)
        if match is None:
            last, above = None, []
            continue
        indent = len(match["indent"])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        parents.append((indent, match["key"]))
        last = ".".join(key for _, key in parents)
        found[last] = match["comment"] or " ".join(above)
        above = []
    return " ".join(top), found


def of_dataclass(kind: type) -> dict[str, str]:
    """Return field -> the comment behind it or, if there is none, in the lines above it; '' if there is neither."""
    found: dict[str, str] = {field.name: "" for field in fields(kind)}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        text = line.strip()
        match = FIELD.match(line)
        if text.startswith("#"):
            above.append(text.removeprefix("#").strip())
        elif match and match["key"] in found:
            _, hash_sign, behind = line.partition("  # ")
            found[match["key"]] = behind.strip() if hash_sign else " ".join(above)
            above = []
        else:
            above = []
    return found
