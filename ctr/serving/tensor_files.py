"""Safetensors files that say what they are, and are whole or not there: what a server keeps over a restart."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.saved_models import read_safetensors, safetensors_of

LARGEST_HEADER = 1 << 20


def sealed(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> bytes:
    """Return the content of a file: tensors, what is said of them, and a CRC-32 of their values."""
    crc32 = 0
    for value in tensors.values():
        crc32 = zlib.crc32(value.contiguous().numpy().tobytes(), crc32)
    return safetensors_of(tensors, {"tessera": json.dumps({**said, "crc32": crc32})})


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under its name, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def remove_partial(folder: Path) -> None:
    """Remove what was being written when a server was killed. Raises OSError."""
    for path in folder.glob(".*.safetensors.partial"):
        path.unlink(missing_ok=True)


def unsealed(content: bytes, path: Path, what: str, format: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file and what is said of them. what: it should be, for messages.

    Raises ExportError: it is none of this format, or its values were changed.
    """
    try:
        (size,) = struct.unpack_from("<Q", content)
        if size > LARGEST_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        said = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["tessera"])
        if said["format"] != format:
            raise ValueError(f"format {said['format']!r}; this version reads {format}")
        if said["crc32"] != zlib.crc32(content[8 + size :]):
            raise ValueError("it was changed: its checksum does not match")
    except (struct.error, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} is no {what}: {' '.join(str(error).split())[:200]}") from None
    return read_safetensors(content, str(path)), dict(said)
