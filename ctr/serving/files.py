"""Read and write folders whose manifest lists every file with its size and CRC-32.

Exports are such folders, and so are models that training publishes (docs/checkpoints.md). They may come from somebody
else: nothing that a file says is believed before its checksum is checked, and no name leads out of its folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.fs

from tessera.ctr.serving.errors import ExportError

MANIFEST = "manifest.json"
LOCK = ".lock"
READ_BYTES = 1 << 22
LARGEST_JSON = 1 << 28  # bytes of a manifest or of another description


class Place:
    """A folder, local or behind a URI that pyarrow opens. Paths are relative to it.

    Raises ExportError: nothing here can open the URI.
    """

    def __init__(self, location: str | Path, filesystem: pa.fs.FileSystem | None = None, root: str = "") -> None:
        self.name = str(location)
        try:
            if filesystem is not None:
                self._fs, self._root = filesystem, root
            elif "://" in self.name:
                self._fs, self._root = pa.fs.FileSystem.from_uri(self.name)
            else:
                self._fs, self._root = pa.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(self.name))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ExportError(f"{self.name} cannot be opened: {' '.join(str(error).split())}") from None
        self.local = isinstance(self._fs, pa.fs.LocalFileSystem)

    def below(self, path: str) -> Place:
        return Place(f"{self.name.rstrip('/')}/{path}", self._fs, f"{self._root.rstrip('/')}/{path}")

    def open(self, path: str) -> Any:
        """Open a file for reading, as Arrow does. Raises OSError; a link counts as one, for states hold none."""
        full = f"{self._root}/{path}"
        if self.local and os.path.realpath(full) != os.path.join(os.path.realpath(self._root), path):
            raise OSError(f"{path} is a symbolic link")
        return self._fs.open_input_file(full)

    def exists(self, path: str) -> bool:
        return bool(self._fs.get_file_info(f"{self._root}/{path}").type != pa.fs.FileType.NotFound)

    def read_json(self, path: str) -> dict[str, Any]:
        """Return an object. Raises ExportError: there is none."""
        try:
            with self.open(path) as file:
                found = json.loads(file.read(LARGEST_JSON))
        except FileNotFoundError:
            raise ExportError(f"{self.name} holds no {path}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ExportError(f"{self.name}/{path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise ExportError(f"{self.name}/{path} is no object")
        return found

    def size_problem(self, path: str, sealed: Mapping[str, int]) -> str | None:
        """Return the problem of a file that is not read (missing, wrong size), or None."""
        try:
            found = self._fs.get_file_info(f"{self._root}/{path}")
        except OSError as error:
            return f"{path} cannot be read: {' '.join(str(error).split())}"
        if found.type != pa.fs.FileType.File:
            return f"{path} is missing" if found.type == pa.fs.FileType.NotFound else f"{path} is no file"
        return None if found.size == sealed["bytes"] else _other_size(path, found.size, sealed)

    def problem(self, path: str, sealed: Mapping[str, int]) -> str | None:
        """Read a whole file and return its problem (missing, wrong size or checksum), or None."""
        size = crc = 0
        try:
            with self.open(path) as file:
                while block := file.read(READ_BYTES):
                    size, crc = size + len(block), zlib.crc32(block, crc)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {' '.join(str(error).split())}"
        if size != sealed["bytes"]:
            return _other_size(path, size, sealed)
        return None if crc == sealed["crc32"] else f"{path} has another checksum than the manifest says"


def _other_size(path: str, size: int, sealed: Mapping[str, int]) -> str:
    return f"{path} has {size:,} bytes; the manifest says {sealed['bytes']:,}"


def checksum(manifest: Mapping[str, Any]) -> str:
    """Return the CRC-32, as hexadecimal text, of all that a manifest says but its own checksum."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "checksum"}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def read_manifest(place: Place, format: int) -> dict[str, Any]:
    """Return a folder's manifest, checked: format, own checksum, `files` as sizes and checksums by path.

    Raises ExportError, one line.
    """
    manifest = place.read_json(MANIFEST)
    if manifest.get("format") != format or manifest.get("format") is True:
        raise ExportError(f"{place.name} has format {manifest.get('format')!r}; this version reads {format}")
    if manifest.get("checksum") != checksum(manifest):
        raise ExportError(f"{place.name}/{MANIFEST} was changed: its checksum does not match")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ExportError(f"{place.name}/{MANIFEST} lists no files")
    for path, sealed in files.items():
        numbers = [sealed.get(key) for key in ("bytes", "crc32")] if isinstance(sealed, dict) else [None]
        if not is_inside(path) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ExportError(f"{place.name}/{MANIFEST} lists {path[:80]!r}; expected a file inside the folder")
    return manifest


def is_inside(path: str) -> bool:
    """Return whether a name leads to a file inside of the folder that it is relative to."""
    parts = PurePosixPath(path).parts
    return bool(parts) and path == "/".join(parts) and ".." not in parts and parts[0] != "/" and "\\" not in path


class SealedWriter:
    """A folder that is being written: every file is synced, and its size and CRC-32 are remembered in `files`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, int]] = {}

    @contextmanager
    def open(self, path: str) -> Iterator[_Counted]:
        full = self.folder / path
        full.parent.mkdir(parents=True, exist_ok=True)
        with open(full, "wb") as file:
            counted = _Counted(file)
            yield counted
            file.flush()
            os.fsync(file.fileno())
        self.files[path] = {"bytes": counted.bytes, "crc32": counted.crc32}

    def write(self, path: str, content: bytes) -> None:
        with self.open(path) as file:
            file.write(content)

    def seal_file(self, path: str) -> None:
        """Take a file into the manifest that something else has written into the folder."""
        size = crc = 0
        with open(self.folder / path, "rb") as file:
            while block := file.read(READ_BYTES):
                size, crc = size + len(block), zlib.crc32(block, crc)
            os.fsync(file.fileno())
        self.files[path] = {"bytes": size, "crc32": crc}

    def finish(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, which makes the folder whole. Returns it."""
        manifest = {**said, "files": self.files}
        manifest["checksum"] = checksum(manifest)
        with open(self.folder / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        for folder, _, _ in os.walk(self.folder, topdown=False):
            sync_folder(folder)
        return manifest


class _Counted:
    """A binary stream that counts the bytes and computes the CRC-32 of what is written."""

    def __init__(self, inner: IO[bytes] | BinaryIO) -> None:
        self._inner = inner
        self.bytes = self.crc32 = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += view.nbytes
        self._inner.write(view)
        return view.nbytes


def hold(folder: Path, option: str) -> IO[str]:
    """Keep a folder for this process until what is returned is closed. option: of the command, that names the folder.

    Raises ExportError: another one has it.
    """
    lock = open(folder / LOCK, "w")  # noqa: SIM115, it is held as long as the server lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ExportError(
            f"{folder} is in use by another server; expected a folder of its own for each ({option})"
        ) from None
    return lock


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
