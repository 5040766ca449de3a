"""Write files of saved states with checksums, durably, and read them back, in a local folder or behind a URI."""

from __future__ import annotations

import copy
import io
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs

from tessera.distributed.atomic import put_in_place, sync_folder
from tessera.distributed.locations import WITHOUT_FOLDERS, filesystem_of, joined

READ_BYTES = 1 << 22
HAND_OVER_BYTES = 1 << 23
REMOTE_BUFFER_BYTES = 1 << 20  # one request each


@dataclass(frozen=True)
class Sealed:
    """Size and checksum of a file in a manifest."""

    bytes: int
    crc32: int


def seal(content: bytes) -> Sealed:
    return Sealed(len(content), zlib.crc32(content))


class ChecksumStream:
    """A writable binary stream that counts the bytes and computes the CRC-32 of what is written.

    progress: called behind each write with the bytes so far.
    """

    closed = False  # Arrow asks

    def __init__(self, inner: IO[bytes], progress: Callable[[int], None]) -> None:
        self._inner, self._progress = inner, progress
        self.bytes = self.crc32 = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += view.nbytes
        self._inner.write(view)
        self._progress(self.bytes)
        return view.nbytes

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._inner.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Do nothing: whoever opened the file closes it, after the stream's users."""


class Storage:
    """A folder, local or behind a URI. Paths are relative to it, with "/" between names.

    note: told again and again what is being written.

    Attributes:
        name: the path or URI. written: what `write` has finished so far, path -> size and checksum.

    Raises ConfigError: nothing here can open the URI.
    """

    def __init__(self, root: str | Path, note: Callable[[str], None] = lambda _: None) -> None:
        self._fs, self._root = filesystem_of(str(root))
        self.name, self.note = str(root), note
        #: Only here is a rename atomic, and only here can files be synced to the disk.
        self.local = isinstance(self._fs, pa.fs.LocalFileSystem)
        self.written: dict[str, Sealed] = {}

    def below(self, path: str) -> Storage:
        return self._at(joined(self.name, path), self.full(path))

    @property
    def base_name(self) -> str:
        return self._root.rstrip("/").rpartition("/")[2]

    def beside(self, name: str) -> Storage:
        """Return the folder of another name in the parent of this one."""
        path, mark, query = self.name.partition("?") if "://" in self.name else (self.name, "", "")
        parent = str(path).rstrip("/").rpartition("/")[0]
        return self._at(joined(f"{parent}{mark}{query}", name), f"{self._root.rstrip('/').rpartition('/')[0]}/{name}")

    def _at(self, name: str, root: str) -> Storage:
        other = copy.copy(self)  # of the same client, which took a while to make
        other.name, other._root, other.written = name, root, {}
        return other

    def full(self, path: str = "") -> str:
        return f"{self._root}/{path}" if path else self._root

    @contextmanager
    def write(self, path: str) -> Iterator[ChecksumStream]:
        """Write a file. When the block ends well its bytes are on the disk and noted in `written`."""
        at = f"writing {path}"
        self.note(at)
        self.make(os.path.dirname(path))
        with open(self.full(path), "wb") if self.local else self._fs.open_output_stream(self.full(path)) as file:
            handed_over = 0

            def progress(size: int) -> None:
                nonlocal handed_over
                self.note(at)
                if self.local and size - handed_over >= HAND_OVER_BYTES:
                    file.flush()
                    let_go(file, handed_over, size)
                    handed_over = size

            stream = ChecksumStream(file, progress)
            yield stream
            if self.local:
                file.flush()
                os.fsync(file.fileno())
        self.written[path] = Sealed(stream.bytes, stream.crc32)
        self.note(f"behind {path}")

    def write_whole(self, path: str, content: bytes) -> None:
        """Replace a file: whoever reads it finds the old content or the new."""
        if not self.local:  # an object appears when it is complete
            with self.write(path) as stream:
                stream.write(content)
            return
        partial = os.path.join(os.path.dirname(path), f".partial-{os.path.basename(path)}")
        with self.write(partial) as stream:
            stream.write(content)
        put_in_place(self.full(partial), self.full(path))

    def open(self, path: str, *, buffered: bool = True) -> BinaryIO:
        """Open a file for reading. buffered: small reads are gathered."""
        if self.local:
            return open(self.full(path), "rb") if buffered else open(self.full(path), "rb", buffering=0)
        file: BinaryIO = self._fs.open_input_file(self.full(path))
        return io.BufferedReader(cast(io.RawIOBase, file), REMOTE_BUFFER_BYTES) if buffered else file

    def read(self, path: str) -> bytes:
        with self.open(path) as file:
            return file.read()

    def problem(self, path: str, expected: Sealed) -> str | None:
        """Read a whole file and return its problem (missing, unreadable, wrong size or checksum); None if there is
        none."""
        try:
            size, crc, memory = 0, 0, memoryview(bytearray(READ_BYTES))
            with self.open(path, buffered=False) as file:
                while count := cast(io.RawIOBase, file).readinto(memory):
                    size += count
                    crc = zlib.crc32(memory[:count], crc)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
        if size != expected.bytes:
            return f"{path} has {size:,} bytes; the manifest says {expected.bytes:,}"
        if crc != expected.crc32:
            return f"{path} has the checksum {crc:08x}; the manifest says {expected.crc32:08x}"
        return None

    def names(self, path: str = "") -> list[str]:
        """Return the names directly in a folder, sorted; none if it does not exist."""
        try:
            infos = self._fs.get_file_info(pa.fs.FileSelector(self.full(path), allow_not_found=True))
        except NotADirectoryError:
            return []
        return sorted(info.base_name for info in infos)

    def all_files(self) -> list[str]:
        """Return the paths of all that lies in this folder or below it and is no folder, sorted."""
        if self.local:
            found = []
            for folder, folders, files in os.walk(self._root):  # a link to a folder is named and not followed
                links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
                found += [os.path.relpath(os.path.join(folder, name), self._root) for name in [*files, *links]]
            return sorted(found)
        infos = self._fs.get_file_info(pa.fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        root = len(self._root.strip("/"))
        return sorted(info.path.strip("/")[root:].strip("/") for info in infos if info.type != pa.fs.FileType.Directory)

    def exists(self, path: str) -> bool:
        return bool(self._fs.get_file_info(self.full(path)).type != pa.fs.FileType.NotFound)

    def make(self, path: str = "") -> None:
        if self.local:
            os.makedirs(self.full(path), exist_ok=True)
        elif self._fs.type_name not in WITHOUT_FOLDERS:
            self._fs.create_dir(self.full(path), recursive=True)

    def remove(self, path: str) -> None:
        """Remove a file or a folder with all in it, if it is there."""
        full = self.full(path)
        kind = self._fs.get_file_info(full).type
        if self.local and kind == pa.fs.FileType.Directory and not os.path.islink(full):
            shutil.rmtree(full)
        elif self.local and os.path.lexists(full):
            os.remove(full)
        elif kind == pa.fs.FileType.Directory:
            self._fs.delete_dir(full)
        elif kind != pa.fs.FileType.NotFound:
            self._fs.delete_file(full)

    def rename(self, path: str, new: str) -> None:
        if self.local:
            os.rename(self.full(path), self.full(new))
        else:
            self._fs.move(self.full(path), self.full(new))

    def copy(self, path: str, new: str) -> None:
        """Copy a file inside the folder; a store does it by itself."""
        self.make(os.path.dirname(new))
        self._fs.copy_file(self.full(path), self.full(new))

    def link_or_copy(self, source: Storage, path: str, new: str) -> None:
        """Have a file of another folder here too: one file under two names where the disk can, else a copy."""
        if self.local and source.local:
            self.make(os.path.dirname(new))
            try:
                os.link(source.full(path), self.full(new))
                return
            except OSError:  # another disk, or one without links
                pass
        with source.open(path) as file, self.write(new) as stream:
            while block := file.read(READ_BYTES):
                stream.write(block)

    def sync_folders(self, *, below: bool = True) -> None:
        """Make the names in this folder, and in all below, durable."""
        if self.local:
            for folder, _, _ in os.walk(self._root, topdown=False) if below else [(self._root, [], [])]:
                sync_folder(folder)


def let_go(file: IO[bytes], begin: int, end: int) -> None:
    """Tell the system that bytes of a local file are not read again soon. Written bytes begin to go to the disk, so
    that it works while the next are made and the last sync is short; bytes that were read leave memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
