"""Store the rows of a trained run in another format: `tessera convert-tables runs/a runs/a8 format=int8`.

The new folder can be scored (`tessera evaluate runs/a8`) as the old one can. The error that rounding makes is
printed by table. Keys are those of `embedding` that tell the format: format, formats, rounding, scale, range.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tessera.ctr.config import Config
from tessera.ctr.runs.convert import convert_run
from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.stored_config import targets_of
from tessera.distributed.process import run
from tessera.distributed.rank import Process


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="a finished run")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("overrides", nargs="+", help="format=int8, formats.w=fp32, format=fp32")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    # Classes that the user names here may be imported for the run: model.target=my_models.Mine.
    named = [f"{key}={value}" for key, value in targets_of(options.overrides).items()]
    overrides = [one if one in named else f"embedding.{one}" for one in options.overrides]

    def load() -> tuple[Config, str, float]:
        config = run_config(options.run_dir, named)
        return config, "cpu", config.trainer.timeout_seconds

    def convert(config: Config, process: Process) -> None:
        for table, groups in convert_run(options.run_dir, options.output, overrides, process).items():
            for group, error in groups.items():
                print(f"{table} {group}: {error}")
        print(f"{options.output} is written")

    return run(load, convert)


if __name__ == "__main__":
    sys.exit(main())
