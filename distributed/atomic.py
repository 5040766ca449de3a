"""Two names of files or folders exchange what they name, so that no moment shows neither."""

from __future__ import annotations

import ctypes
import os
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
