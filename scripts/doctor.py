"""Check the installation: one line per finding (ok, warn or FAIL, with its cure). Exit status 1 after a FAIL.

    tessera doctor [--quick]
    python scripts/doctor.py [--quick]     where nothing is installed

--quick, for the end of an installation, shows only what needs attention.
"""

import argparse
import sys
from collections.abc import Sequence


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check the installation.")
    parser.add_argument("--quick", action="store_true", help="only what an installation can get wrong, problems only")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    quick = make_parser().parse_args(arguments).quick
    try:
        from tessera.ctr.doctor import check_all
    except ImportError as error:  # whatever hides the project must not hide the cure
        at = getattr(sys.modules.get("tessera"), "__file__", None)
        found = f"{at} hides our package of that name" if at else str(error)
        print(f"FAIL  names     tessera cannot be imported: {found}; cure: run `make install` or use a fresh .venv")
        return 1
    failed = warned = False
    for finding in check_all(sys.path, quick=quick):
        failed |= finding.level == "FAIL"
        warned |= finding.level == "warn"
        if not quick or finding.level != "ok":
            print(finding, flush=True)
    if quick and not failed:
        print("doctor: the installation works" + (", with the warnings above" if warned else ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
