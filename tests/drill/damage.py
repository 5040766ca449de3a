"""What a drill does to the files of a job, and how it is undone; a disk that is too small."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

FAULTS = ("kill one", "kill all", "disk full", "file removed", "stray file", "truncated file", "flipped bit")
STRAYS = (
    "junk.txt",
    "part-9.parquet",
    "00007-of-00008.parquet",
    ".partial-step-000000000009",
    "tmp",
    "manifest.json.1",
)


@dataclass
class Damage:
    """One file that was changed, as it was before; None if it was not there."""

    path: Path
    before: bytes | None
    after: bytes | None = None

    def __post_init__(self) -> None:
        self.after = self.path.read_bytes() if self.path.exists() else None

    def is_there(self) -> bool:
        """Whether the file is still as the damage left it: nobody has written it again since."""
        return (self.path.read_bytes() if self.path.exists() else None) == self.after

    @classmethod
    def do(cls, fault: str, files: list[Path], draw: random.Random) -> Damage | None:
        """Damage one of the files, or put a stray one beside it. None: there is none."""
        files = [path for path in files if path.is_file() and path.stat().st_size]
        if not files:
            return None
        path = draw.choice(files)
        try:
            content = path.read_bytes()
            if fault == "stray file":
                path = path.with_name(draw.choice(STRAYS))
                if path.exists():
                    return None
                path.write_bytes(draw.randbytes(draw.randrange(100)))
                return cls(path, None)
            if fault == "file removed":
                path.unlink()
            elif fault == "truncated file":
                with open(path, "r+b") as file:
                    file.truncate(draw.randrange(len(content)))
            else:
                place = draw.randrange(len(content))
                with open(path, "r+b") as file:
                    file.seek(place)
                    file.write(bytes([content[place] ^ 1 << draw.randrange(8)]))
        except FileNotFoundError:  # the job has removed or renamed it meanwhile
            return None
        return cls(path, content)

    def undo(self) -> None:
        if self.before is None:
            self.path.unlink(missing_ok=True)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self.before)


class SmallDisk:
    """A file system in memory at a folder, with so little free space as it is told to have."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)], check=True)

    def leave_free(self, size: float) -> None:
        """Leave so many bytes free, rounded to blocks."""
        found = os.statvfs(self._folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        blocks = max(1, int(used + size) // 4096)
        subprocess.run(["mount", "-o", f"remount,nr_blocks={blocks}", str(self._folder)], check=True)

    def grow(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=1g", str(self._folder)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self._folder)], check=True)

    @staticmethod
    def possible(scratch: Path) -> bool:
        if shutil.which("mount") is None:
            return False
        try:
            SmallDisk(scratch / "probe").close()
        except (subprocess.CalledProcessError, OSError):
            return False
        return True
