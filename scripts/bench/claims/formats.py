"""The claims of LPT and ALPT (rows of few bits) and of ScaleFreeCTR (rows on the host, a cache on the device)."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.train.evaluate import evaluate
from tessera.ctr.train.trainer import Trainer
from tessera.scripts.bench.claims.bench import COMMON, Arm, Bench, Row, Rows, absent
from tessera.scripts.bench.claims.towers import HIDDEN
from tessera.scripts.bench.fits import Result, trained
from tessera.scripts.bench.low_precision import ALPT, INT8

DEEPFM = ("model=deepfm", HIDDEN)
INT4 = "embedding.format=int4"
FP32 = Arm("fp32", DEEPFM, {})
LPT8 = Arm("int8 LPT", (*DEEPFM, *INT8), {})
NEAREST8 = Arm("int8 LPT to nearest", (*DEEPFM, *INT8, "embedding.rounding=nearest"), {})
ALPT8 = Arm("int8 ALPT", (*DEEPFM, *INT8, *ALPT), {})
LPT4 = Arm("int4 LPT", (*DEEPFM, INT4), {"embedding.range": (0.1, 0.3)})
ALPT4 = Arm("int4 ALPT", (*DEEPFM, INT4, "embedding.range=0.1", *ALPT), {"embedding.alpt.lr": (2e-5, 1e-3)})
CACHE_ROWS = (1_000, 2_500)
CACHE_BATCH = "trainer.batch_size=256"  # the cache holds what two batches look up, at least


def synthetic(name: str, rows: int, epochs: int, zipf: float = 1.05) -> Rows:
    """Return Criteo-shaped rows: other ones for each seed."""

    def make(seed: int, folder: Path) -> object:
        config = SyntheticConfig(rows=rows, seed=seed, valid=0.15, test=0.15, zipf=zipf)
        return write_synthetic(config, folder, Writing(4096))

    own = ("data=synthetic", "trainer.batch_size=1024", f"trainer.epochs={epochs}", "trainer.early_stop.patience=1")
    return Rows(name, make, own, {"rows": rows, "zipf": zipf})


def low_precision(bench: Bench, logs: Path | None) -> list[Row]:
    where = synthetic("as Criteo", 80_000, 2)
    return [
        bench.compared("LPT: int8 near fp32", "near", where, LPT8, FP32, 0.001),
        bench.compared("LPT: stochastic rounding above nearest", "faster, smaller error", where, LPT8, NEAREST8),
        bench.compared("ALPT: int8 loses nothing", "no loss", where, ALPT8, FP32, 0.001),
        bench.compared("ALPT above LPT at int4", "clearly better", where, ALPT4, LPT4),
    ]


def cache(bench: Bench, logs: Path | None) -> list[Row]:
    """Rows of the same bits with a cache as without, and the share of rows that a batch finds in it."""
    found = []
    for zipf in (1.05, 1.2):
        where = synthetic(f"zipf {zipf}", 60_000, 1, zipf)
        runs = {size: [_cached(bench, where, size, seed) for seed in bench.seeds] for size in (None, *CACHE_ROWS)}
        plain = runs.pop(None)
        for size, results in runs.items():
            claim, paper = f"a cache of {size:,} rows a table changes no bit", "same result"
            both = [one for one in (*plain, *results) if one is not None]
            if len(both) < 2 * len(bench.seeds):
                found.append(absent(claim, paper, where.name, "not run"))
                continue
            found.append(_of_cache(claim, paper, where.name, both[: len(bench.seeds)], both[len(bench.seeds) :]))
    return found


def _of_cache(claim: str, paper: str, where: str, plain: list[Result], cached: list[Result]) -> Row:
    same = sum(one["bits"] == other["bits"] for one, other in zip(plain, cached, strict=True))
    hits = [one["hits"] for one in cached]
    share = statistics.fmean(one["share"] for one in cached)
    ours = f"{same} of {len(plain)} runs the same; {share:.0%} of the rows of tables that outgrow it are in it"
    rates = ", ".join(f"{one:.1%}" for one in hits)
    return Row(
        claim,
        paper,
        where,
        ours,
        f"hits {statistics.fmean(hits):.1%} ({rates})",
        "holds" if same == len(plain) else "does not hold",
    )


def _cached(bench: Bench, where: Rows, size: int | None, seed: int) -> Result | None:
    own = [*COMMON, *where.overrides, *DEEPFM, CACHE_BATCH, f"trainer.seed={seed}"]
    own += [] if size is None else [f"embedding.cache_rows={size}"]
    made_of = {"rows": dict(where.made_of), "overrides": own}
    name = f"cache/{where.name}-{size}-{seed}"
    return bench.once(name, made_of, partial(_fitted, bench, where, own, size, seed))


def _fitted(bench: Bench, where: Rows, own: list[str], size: int | None, seed: int) -> Result:
    data = bench.folder_of(where, seed)
    with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
        trainer = trained([*own, f"data.path={data}", f"trainer.run_dir={scratch}/run"], bench.process)
        result: Result = {"bits": _bits(trainer, bench, Path(scratch) / "scores")}
        tables = trainer.engine.dynamic
        assert tables is not None
        rows = {name: one["rows"] for name, one in tables.stats().items()}
        stats = tables.cache_stats()
        if stats is not None and size is not None:
            outgrown = [name for name, count in rows.items() if count > size]
            hits, misses = (sum(stats.by_table[name][key] for name in outgrown) for key in ("hits", "misses"))
            there = sum(rows[name] for name in outgrown)  # each of them missed once, when it was new
            result |= {"hits": hits / max(1, hits + misses - there), "share": size * len(outgrown) / max(1, there)}
    return result | {"rows": sum(rows.values())}


def _bits(trainer: Trainer, bench: Bench, folder: Path) -> str:
    """Return a digest of all dense weights and of the predictions on the test split."""
    digest = hashlib.sha256()
    for name, weight in sorted(trainer.engine.network.tower.state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    reader = trainer.readers["test"]
    assert reader is not None
    evaluate(trainer.engine.model, reader, bench.process, folder, "test")
    for path in sorted(folder.glob("*.parquet")):
        digest.update(pq.read_table(path, columns=["prediction"])["prediction"].to_numpy().tobytes())
    return digest.hexdigest()
