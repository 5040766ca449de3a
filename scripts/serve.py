"""Serve an export over HTTP: `tessera serve exports/mine --port 8000`, and follow what a run over days publishes:
`tessera serve exports/mine --follow runs/mine/published`. docs/serve.md has bodies, answers and limits.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tessera.ctr.serving.feedback import Feedback
    from tessera.ctr.serving.scorer import Scorer

NEEDED = ("starlette", "uvicorn", "prometheus_client")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a folder that `tessera export` wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="read all of the export first and compare every checksum")
    parser.add_argument("--follow", metavar="PUBLISHED", help="`published` of a run over days, a folder or URI")
    parser.add_argument(
        "--versions", type=Path, help="folder for the models that are followed (default: beside the export)"
    )
    parser.add_argument(
        "--merge-share",
        type=float,
        default=0.25,
        help="changed rows beside all, from which the tables are written anew (default: %(default)s)",
    )
    parser.add_argument("--poll-seconds", type=float, default=5.0, help="between looks at it (default: %(default)s)")
    parser.add_argument("--batch-ms", type=float, default=2.0, help="longest wait for others (default: %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=4096, help="rows of a full pass (default: %(default)s)")
    parser.add_argument("--timeout-seconds", type=float, default=5.0, help="for an answer (default: %(default)s)")
    parser.add_argument("--body-mb", type=float, default=16.0, help="of a request, at most (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=10_000, help="of a request, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of one pass (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=1, help="at the same time (default: %(default)s)")
    parser.add_argument(
        "--memory", type=Path, help="folder of an error memory, made if it is not there; labels come to /feedback"
    )
    parser.add_argument("--memory-arrays", type=int, default=16, help="K, of a new one (default: %(default)s)")
    parser.add_argument("--memory-bits", type=int, default=8, help="L, of a new one (default: %(default)s)")
    parser.add_argument("--memory-strength", type=float, default=0.5, help="lambda (default: %(default)s)")
    parser.add_argument("--memory-gamma", type=float, default=0.0, help="from 0 to 1 (default: %(default)s)")
    parser.add_argument(
        "--feedback-hours", type=float, default=24.0, help="that labels may take (default: %(default)s)"
    )
    parser.add_argument(
        "--feedback-rows", type=int, default=1_000_000, help="that wait for labels, at most (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: tessera serve needs {missing[0]}: pip install tessera-ctr[serve]", file=sys.stderr)
        return 2
    from tessera.embedding.errors import TesseraError

    try:
        return _serve(options)
    except (TesseraError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _feedback(options: argparse.Namespace, scorer: Scorer) -> Feedback | None:
    from tessera.ctr.serving.error_memory import ErrorMemory, MemorySettings
    from tessera.ctr.serving.errors import ExportError
    from tessera.ctr.serving.feedback import Feedback, Waiting
    from tessera.embedding.settings import check

    if options.memory is None:
        return None
    width = scorer.description.hidden
    if width is None:
        raise ExportError(f"--memory: {scorer.folder} has no hidden layer in its graph; export it with --hidden")
    settings = MemorySettings(
        arrays=options.memory_arrays,
        bits=options.memory_bits,
        strength=options.memory_strength,
        gamma=options.memory_gamma,
    )
    check(settings, "--memory-")
    empty = ErrorMemory(width, settings, scorer.base)
    return Feedback.open(options.memory, empty, Waiting(options.feedback_rows, 3600 * options.feedback_hours))


def _serve(options: argparse.Namespace) -> int:
    import torch
    import uvicorn

    from tessera.ctr.serving.app import Server, Settings
    from tessera.ctr.serving.batches import Limits
    from tessera.ctr.serving.connections import protocol_with_a_limit
    from tessera.ctr.serving.scorer import Scorer
    from tessera.ctr.serving.versions import Versions

    torch.set_num_threads(options.threads)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # of each table some files are mapped
    folder = options.export
    versions = None
    if options.check:
        Scorer.load(folder, check=True)
    if options.follow:
        beside = folder.resolve().with_name(f"{folder.resolve().name}.versions")
        versions = Versions(folder, options.follow, options.versions or beside, options.merge_share)
    scorer = versions.begin() if versions else Scorer.load(folder)
    limits = Limits(
        wait_seconds=options.batch_ms / 1000,
        batch_rows=options.batch_rows,
        timeout_seconds=options.timeout_seconds,
        body_bytes=int(options.body_mb * (1 << 20)),
        rows=options.rows,
    )
    feedback = _feedback(options, scorer)
    server = Server(scorer, Settings(limits, versions, options.poll_seconds, options.passes, feedback))
    print(f"serving {scorer.version} on http://{options.host}:{options.port}", file=sys.stderr, flush=True)
    uvicorn.run(
        server.app(),
        host=options.host,
        port=options.port,
        log_level="warning",
        http=protocol_with_a_limit(2 * options.timeout_seconds + 5),
        ws="none",
        timeout_graceful_shutdown=int(options.timeout_seconds) + 1,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
