"""Write and read the record of the compiled kernels, which says whether they may be used.

The library is `kernels/_C*.so`, the record `kernels/_build.json` beside it: from which sources and for
which torch the library was made, or why there is none. A library that does not match is never loaded.
Standard library only: `setup.py` and the doctor read this where torch may be missing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
NAME = "_build.json"


def source_hash(folder: Path = SOURCES) -> str | None:
    """Return a hash over names and contents of the C++ sources; None if they are not installed."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".h"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def write(folder: Path, **fields: str | None) -> None:
    """Write the record into `folder`: keys library (file name or None), sources, torch, compiler, reason."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(fields, indent=1) + "\n")


def read(folder: Path = HERE) -> dict[str, str | None]:
    """Return the record, or {} if there is none or it cannot be read."""
    try:
        record = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def problem(torch_version: str, folder: Path = HERE) -> str | None:
    """Return why the compiled library in `folder` cannot be used with this torch (one line), or None if it can."""
    record = read(folder)
    if not record:
        return "the kernels have not been compiled; run `make install`"
    library = record.get("library")
    if not library:
        return f"the kernels were not compiled: {record.get('reason', 'reason unknown')}"
    if not (folder / library).is_file():
        return f"{library} is missing; run `make install`"
    if record.get("torch") != torch_version:
        made_for = record.get("torch")
        return f"{library} was compiled for torch {made_for}, found {torch_version}; run `make install`"
    if source_hash(folder / SOURCES.name) not in (None, record.get("sources")):
        return f"{library} was compiled from other sources than kernels/csrc; run `make install`"
    return None
