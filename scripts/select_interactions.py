"""Search which pairs of fields to memorise, to multiply and to leave out (OptInter), and train with what is chosen.

`tessera select-interactions --output pairs/a model=optinter data=mine data.path=.. trainer.epochs=1` counts what pairs
of ids say of the labels, crosses the best `--pairs` of them, trains the search, and trains again from scratch with the
way that each pair has chosen by the best model on the valid split. The folder gets interactions.json, a run folder for
each training, and conf/, with which `tessera train` trains the same model. Start the same command again to go on.
Several ranks: torchrun --nproc-per-node 2 -m tessera.scripts.select_interactions ... (docs/feature_selection.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.distributed.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from tessera.ctr.config import Config
    from tessera.distributed.rank import Process


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as of tessera train: model=optinter data=mine ..")
    parser.add_argument(
        "--config-dir", action="append", default=[], help="a folder of your own yaml, laid out as conf/"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the result and of the runs")
    parser.add_argument("--pairs", type=int, default=50, help="so many may be memorised, those of most information")
    parser.add_argument("--rows", type=int, default=200_000, help="training rows in which pairs are counted")
    parser.add_argument("--threshold", type=int, default=20, help="a pair of ids seen so often gets a row")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate of the weights that choose")
    parser.add_argument("--no-retrain", action="store_true", help="only search")
    parser.add_argument(
        "--by-information",
        type=int,
        metavar="COUNT",
        help="train also with so many crosses of most information and no products, to compare",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_intermixed_args(arguments)
    let_idle_threads_sleep()  # before the imports below load torch

    from tessera.ctr.config import load_config
    from tessera.ctr.selection.interactions import RESULT, SearchSettings, select_interactions
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        folders = [word for folder in options.config_dir for word in ("--config-dir", folder)]
        config = load_config([*folders, *options.overrides], "")
        return config, config.trainer.device, config.trainer.timeout_seconds

    def search(config: Config, process: Process) -> None:
        settings = SearchSettings(
            options.pairs,
            options.rows,
            options.threshold,
            options.lr,
            options.by_information,
            retrain=not options.no_retrain,
        )
        found, runs = select_interactions(config, process, options.output, settings)
        if process.is_main:
            ways = [one.choice for one in found]
            said = ", ".join(f"{way} {ways.count(way)}" for way in ("memorise", "factorise", "naive"))
            print(f"{len(found)} pairs: {said}; runs: {', '.join(runs)}; {options.output / RESULT}")

    return run(load, search)


if __name__ == "__main__":
    sys.exit(main())
