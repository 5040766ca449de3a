"""Make one folder that serves a model without the system that trained it: `tessera export runs/mine --output x`.

The folder holds the tower as torch.export writes it, the features as data, tables as memory-mapped files, and golden
rows with their scores, which are compared with those of evaluation before the folder takes its name (docs/export.md).
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

FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int2")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", help="data.path=/data/elsewhere, where golden rows come from")
    parser.add_argument("--output", required=True, type=Path, help="a new folder, or that of an export before")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="store rows that become smaller by it so; the error of each table is printed (default: as training does)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="add the tower compiled by AOTInductor, for this machine"
    )
    parser.add_argument("--onnx", action="store_true", help="add the tower as ONNX, compared by onnxruntime")
    parser.add_argument(
        "--hidden",
        action="store_true",
        help="the graph answers also what its last layer reads, for `tessera serve --memory`",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    let_idle_threads_sleep()  # before the imports below load torch

    from tessera.ctr.export.export import Options, export_model
    from tessera.ctr.export.source import source_of_run
    from tessera.ctr.runs.score import run_config
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = run_config(options.run_dir, options.overrides)
        return config, "cpu", config.trainer.timeout_seconds

    def export(config: Config, process: Process) -> None:
        chosen = Options(options.format, compiled=options.compile, onnx=options.onnx, hidden=options.hidden)
        source = source_of_run(config, options.run_dir, process)
        exported = export_model(config, process, source, options.output, [options.run_dir, config.data.path], chosen)
        print("\n".join(exported.lines()))

    return run(load, export)


if __name__ == "__main__":
    sys.exit(main())
