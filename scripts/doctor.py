"""Check the installation: one line per finding (ok, warn or FAIL, with its cure). Exit status 1 after a FAIL.

    python scripts/doctor.py [--quick]

--quick, for the end of an installation, shows only what needs attention.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the installation.")
    parser.add_argument("--quick", action="store_true", help="only what an installation can get wrong, problems only")
    quick = parser.parse_args().quick
    path = list(sys.path)  # as the other scripts have it, before our folder is put first for the import below
    sys.path.insert(0, str(ROOT))
    from ctr.doctor import check_all

    failed = warned = False
    for finding in check_all(path, quick):
        failed |= finding.level == "FAIL"
        warned |= finding.level == "warn"
        if not quick or finding.level != "ok":
            print(finding, flush=True)
    if quick and not failed:
        print("doctor: the installation works" + (", with the warnings above" if warned else ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
