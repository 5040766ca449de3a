"""Change files and folders as a whole or not at all, durably, also if the machine loses power."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' headers


def exchange(one: str | Path, other: str | Path) -> bool:
    """Let each name what the other named, in one step. Return False, with nothing changed, where the system cannot.

    Raises OSError: it can, and it failed.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or an old C library
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if not (os.path.lexists(one) and os.path.lexists(other)):
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    return False  # some network disks have no such step


def partial_of(path: Path) -> Path:
    """Return the name beside `path` under which its new content is written."""
    return path.with_name(f".{path.name}.partial")


def put_in_place(partial: str | Path, path: str | Path) -> None:
    """Make the written file `partial` durable and let it replace `path`, whose readers find the old content or all of
    the new. Raises OSError."""
    sync_file(partial)
    os.replace(partial, path)
    sync_folder(os.path.dirname(os.path.abspath(path)))


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield the name of a new file that takes the place of `path` when the block ends well; when it does not, the old
    file stays and nothing else. Raises OSError."""
    partial = partial_of(path)
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by one that holds `text`, in UTF-8. Raises OSError; the old file stays then."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_file(path: str | Path) -> None:
    """Make what was written to a file durable. Raises OSError."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
