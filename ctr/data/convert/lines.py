"""Read text files, compressed or not, in blocks of whole lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tessera.ctr.data.errors import DataError

LONGEST_LINE_BYTES = 64 << 20
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file. `data` ends with a newline; `first_line` counts from 1, as editors do."""

    path: Path
    first_line: int
    data: bytes


def read_line_blocks(
    path: Path, block_bytes: int, on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[LineBlock]:
    """Yield the file's lines in blocks of about `block_bytes` bytes (always at least one line).

    `on_bytes` is told how many bytes of the file as stored (compressed, if it is) were consumed since the
    last call. Raises DataError when the file cannot be opened or decompressed, or holds a line above 64 MiB.
    """
    try:
        stored = pa.OSFile(str(path), "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {_first_line(error)}") from error
    compression = COMPRESSIONS.get(path.suffix.lower())
    line, told, rest = 1, 0, b""
    with stored, pa.CompressedInputStream(stored, compression) if compression else stored as stream:
        while True:
            text = _read(stream, path, block_bytes, line)
            position = stored.tell()
            on_bytes(position - told)
            told = position
            if not text:
                break
            if line == 1 and not rest:
                text = text.removeprefix(b"\xef\xbb\xbf")
            end = text.rfind(b"\n") + 1
            if end == 0:
                rest += text
                if len(rest) > LONGEST_LINE_BYTES:
                    raise DataError(
                        f"{path} line {line}: longer than {LONGEST_LINE_BYTES} bytes, expected lines of text"
                    )
                continue
            block = LineBlock(path, line, rest + text[:end])
            rest = text[end:]
            line += block.data.count(b"\n")
            yield block
    if rest:
        yield LineBlock(path, line, rest + b"\n")


def _read(stream: pa.NativeFile, path: Path, size: int, line: int) -> bytes:
    try:
        return stream.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read past line {line}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
