"""Write the golden results again: `python -m tests.golden.update [JOB ...]`; without names, those of all jobs.

A change of code that is to leave results alone must not need this. A commit that moves these files says in its message
which results moved and why, and holds nothing else.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.golden.compare import differences
from tests.golden.jobs import FOLDER, JOBS, measure, read, write, write_all


def main(names: list[str]) -> int:
    if unknown := sorted(set(names) - set(JOBS)):
        print(f"no such job: {', '.join(unknown)}; there are {', '.join(JOBS)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder))
        for name in names or JOBS:
            found = measure(name, Path(folder), Path(folder))
            known = (FOLDER / f"{name}.json").exists()
            moved = differences(read(name), found, exact=True) if known else ["new"]
            print(f"{name}: {'; '.join(moved[:3]) if moved else 'as it was'}{' ...' if len(moved) > 3 else ''}")
            write(name, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
