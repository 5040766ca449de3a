"""Show what saved states hold: `tessera inspect runs/mine`, or one state, or a best/ folder.

Checks every file, and shows steps, ranks, tables and rows. --table and --id show rows. --compact makes one full state
of the newest delta and those that it builds on (no job may be using the folder).
"""

import argparse
import sys
from collections.abc import Sequence

from tessera.distributed.process import run_alone
from tessera.distributed.saved.inspect import inspect


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a run's folder, a folder of states, a state, or a URI of one of them")
    parser.add_argument("--table", help="show the first rows of this table")
    parser.add_argument("--id", type=int, help="with --table: show the row of this id")
    parser.add_argument("--rows", type=int, default=5, help="with --table: so many rows")
    parser.add_argument("--compact", action="store_true", help="make the newest state a full one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    return run_alone(lambda: inspect(options.path, options.table, options.id, options.rows, compacting=options.compact))


if __name__ == "__main__":
    sys.exit(main())
