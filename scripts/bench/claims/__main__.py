"""Show, for each of the eight systems that Tessera brings together, what its paper claims, on data at hand.

    python -m tessera.scripts.bench.claims --data FOLDER         # the small logs: ml-100k, ml-100k-random
    python -m tessera.scripts.bench.claims --only PNN --seeds 4 5 6
    python -m tessera.scripts.bench.claims --table               # of what is there

writes docs/claims.md: the claim, the paper's figure, ours, the difference seed by seed with its interval, and whether
it holds. Both sides of a comparison are tuned over the same grid, on valid, with a seed of their own. Results lie in
build/bench/claims, a file each: what is there is not done again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tessera.distributed import process as processes
from tessera.scripts.bench.claims import days, formats, towers
from tessera.scripts.bench.claims.bench import Bench, Row
from tessera.scripts.bench.claims.page import Shown, System, page
from tessera.scripts.bench.claims.text import HEADING, SYSTEMS
from tessera.scripts.bench.fits import Fits

CLAIMS: dict[str, Callable[[Bench, Path | None], list[Row]]] = {
    "DeepFM": towers.deepfm,
    "AutoInt": towers.attention,
    "PNN": towers.products,
    "FGCNN": towers.fgcnn,
    "ALPT": formats.low_precision,
    "Monolith": days.monolith,
    "ScaleFreeCTR": formats.cache,
    "IncCTR": days.incremental,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of ml-100k and ml-100k-random; without it synthetic rows alone"
    )
    parser.add_argument("--output", type=Path, default=Path("build/bench/claims"), help="folder of the results")
    parser.add_argument("--page", type=Path, default=Path("docs/claims.md"), help="what is written")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CLAIMS,
        default=list(CLAIMS),
        metavar="SYSTEM",
        help="train these; the page has what is there of the others",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="of data and models; 0 is that of tuning"
    )
    parser.add_argument("--table", action="store_true", help="train nothing")
    chosen = parser.parse_args(arguments)
    logging.disable(logging.INFO)  # of hundreds of runs
    process = processes.start("cpu", 300.0)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found: dict[System, Shown] = {}
            for name, shown in CLAIMS.items():
                fits = Fits(chosen.output, read_only=chosen.table or name not in chosen.only)
                bench = Bench(fits, process, Path(scratch), chosen.seeds)
                rows = shown(bench, chosen.data)
                ended = bench.to_the_end.values()
                found[SYSTEMS[name]] = Shown(rows, sum(bench.seconds.values()), len(ended), sum(ended))
                chosen.page.write_text(page(found, HEADING))
    finally:
        processes.stop(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
