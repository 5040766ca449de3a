"""Read and write text files of a report, with JSON that people can read, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """Return the text without the space around; "" if there is no such file."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def json_text(values: Any, indent: str = "") -> str:
    """Return JSON with a line for each key and for each object of a list; a list of numbers stands on one line."""
    inner = indent + "  "
    if isinstance(values, dict) and values:
        lines = [f"{inner}{json.dumps(str(key))}: {json_text(value, inner)}" for key, value in values.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        lines = [inner + json.dumps(value, allow_nan=False) for value in values]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(values, allow_nan=False)
