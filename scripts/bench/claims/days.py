"""The claims of Monolith and IncCTR: models that live from day to day."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tessera.distributed.tables import owned_tables
from tessera.scripts.bench.claims.bench import COMMON, Bench, Row, Rows, absent
from tessera.scripts.bench.claims.formats import DEEPFM, synthetic
from tessera.scripts.bench.claims.paired import paired, verdict, written
from tessera.scripts.bench.collisions import FRACTIONS, child
from tessera.scripts.bench.daily_data import Days, make_days
from tessera.scripts.bench.daily_methods import DATA, METHODS, Model, follow, metrics, online
from tessera.scripts.bench.fits import Result

#: daily_methods chose its rates with this optimizer.
ROWWISE = "optimizer.sparse.name=rowwise_adagrad"
TTL_DAYS = 3
EXPIRING = {"days": 12, "rows": 60_000}
INCREMENTAL = {"days": 10, "rows": 80_000}
SETTLED = 5  # days before those that count


def monolith(bench: Bench, logs: Path | None) -> list[Row]:
    return [*_expiring(bench), *_online(bench, logs), *_collisions(bench, logs)]


def _collisions(bench: Bench, logs: Path | None) -> list[Row]:
    """Every id in a row of its own beside ids that share rows, as `collisions.py` has them."""
    arms = [name for name, divisor in FRACTIONS.items() if divisor in (None, 4)]
    found = []
    for where in (synthetic("as Criteo", 80_000, 2),):
        claim, paper = "a row for every id above ids hashed into", "above from the first epoch on (figure)"
        if not bench.there(where):
            found.append(absent(f"{claim} fewer rows", paper, where.name, f"{where.needs} is not there"))
            continue
        runs = {arm: [_collided(bench, where, arm, seed) for seed in bench.seeds] for arm in arms}
        for arm in arms[1:]:
            rows = f"{claim} {FRACTIONS[arm]} times fewer rows"
            found.append(_row(rows, paper, where.name, {"collisionless": runs[arms[0]], "hashed": runs[arm]}))
    return found


def _collided(bench: Bench, where: Rows, arm: str, seed: int) -> Result | None:
    own = [*COMMON, *where.overrides, *DEEPFM]

    def make() -> Result:
        report = child(arm, seed, [*own, f"data.path={bench.folder_of(where, seed)}"])
        return {"auc": report["auc"]}

    name = f"collisions/{where.name}-{FRACTIONS[arm]}-{seed}"
    return bench.once(name, {"rows": dict(where.made_of), "overrides": own}, make)


def _expiring(bench: Bench) -> list[Row]:
    """Days with new ids: rows and accuracy on the following day with and without expiry."""
    arms = {"no expiry": None, f"expiry after {TTL_DAYS} days": TTL_DAYS}
    runs = {arm: [_expired(bench, ttl, seed) for seed in bench.seeds] for arm, ttl in arms.items()}
    claim, paper, where = "expiring ids keep memory flat", "said, no figure", f"{EXPIRING['days']} synthetic days"
    kept, expired = runs.values()
    both: list[Result] = [one for one in (*kept, *expired) if one is not None]
    if len(both) < 2 * len(bench.seeds):
        return [absent(claim, paper, where, "not run")]
    sides = both[: len(bench.seeds)], both[len(bench.seeds) :]
    growth = [[one["rows"][-1] / one["rows"][SETTLED] for one in results] for results in sides]
    grown = [statistics.fmean(one) for one in growth]
    ours = f"rows of the last day / of day {SETTLED + 1}: {grown[1]:.2f}, without {grown[0]:.2f}"
    flat = paired([1.05] * len(bench.seeds), growth[1])
    return [
        Row(claim, paper, where, ours, written(paired(growth[1], growth[0]), 2), verdict(flat)),
        _row("at no loss of AUC on the next day", paper, where, {"with expiry": expired, "without": kept}, 0.001),
    ]


def _expired(bench: Bench, ttl: int | None, seed: int) -> Result | None:
    own = [*DATA["synthetic"][0], *METHODS["warm start"].rates["synthetic"], ROWWISE]
    own += [f"embedding.ttl_days={'null' if ttl is None else ttl}"]

    def make() -> Result:
        rows: list[float] = []
        auc: list[float] = []
        with (
            _days(bench, "synthetic", seed, EXPIRING) as days,
            tempfile.TemporaryDirectory(dir=bench.scratch) as scratch,
        ):
            model = Model(days, own, seed, bench.process, Path(scratch) / "run")
            for today, tomorrow in zip(days.names[:-1], days.names[1:], strict=True):
                model.train([today])
                tables = model.trainer.engine.dynamic
                assert tables is not None
                for table in owned_tables(model.trainer.engine.tables).values():
                    table.expire(model.trainer.progress.now)
                rows.append(sum(table["rows"] for table in tables.stats().values()))
                auc.append(metrics(model.score([tomorrow]))["auc"])
            model.close()
        return {"rows": rows, "by_day": auc, "auc": statistics.fmean(auc[SETTLED:])}

    return bench.once(f"expiring/{ttl}-{seed}", {"days": EXPIRING, "overrides": own}, make)


def _online(bench: Bench, logs: Path | None) -> list[Row]:
    """A model trained on the first 5/7 of MovieLens, beside itself going on with the rest in pieces."""
    folder, where = (logs or Path("data")) / "ml-100k", "MovieLens by time"
    if not (bench.fits.read_only or folder.is_dir()):
        return [absent("online updates above none", "+0.0024 (Criteo)", where, f"{folder} is not there")]
    runs = [_followed(bench, folder, seed) for seed in bench.seeds]
    names = ["batch", *(f"sync every 1/{pieces}" for pieces in (10, 50, 100))]
    by_name = {name: [None if run is None else {"auc": run[name]} for run in runs] for name in names}
    papers = ("+0.0024 (Criteo)", "+0.0012", "+0.0002")
    return [
        _row(f"{more} above {less}", paper, where, {more: by_name[more], less: by_name[less]})
        for less, more, paper in zip(names[:-1], names[1:], papers, strict=True)
    ]


def _followed(bench: Bench, folder: Path, seed: int) -> Result | None:
    own = [*DATA["movielens"][0], *METHODS["warm start"].rates["movielens"], ROWWISE]

    def make() -> Result:
        with _days(bench, "movielens", seed, {"rows": 0, "days": 0}, folder, in_pieces=True) as days:
            return online(days, own, seed, bench.process)

    return bench.once(f"online/{seed}", {"rows": "ml-100k", "overrides": own}, make)


def incremental(bench: Bench, logs: Path | None) -> list[Row]:
    """One model that goes on day by day, with and without a teacher, beside one trained anew on a window."""
    arms = ("window of 7 days", "warm start", "IncCTR, KD-self")
    found, where = [], f"{INCREMENTAL['days']} synthetic days"
    runs = {arm: [_daily(bench, arm, seed) for seed in bench.seeds] for arm in arms}
    window = runs[arms[0]]
    for arm in arms[1:]:
        found.append(
            _row(f"{arm}: near a full window", "same accuracy", where, {arm: runs[arm], "window": window}, 0.001)
        )
        row = _row(
            f"{arm}: seconds of training, of a window's", "a fraction", where, {arm: runs[arm], "window": window}
        )
        both = [[one["a day"] for one in results if one is not None] for results in (runs[arm], window)]
        if row.difference:
            share = [a / b for a, b in zip(*both, strict=True)]
            ours = f"{statistics.fmean(share):.2f} ({', '.join(f'{one:.2f}' for one in share)})"
            row = row._replace(ours=ours, difference="", holds="holds" if max(share) < 0.5 else "does not hold")
        found.append(row)
    for arm in arms[2:]:
        found.append(
            _row(f"{arm} above warm start alone", "", where, {arm: runs[arm], "warm start": runs["warm start"]})
        )
    return found


def _daily(bench: Bench, arm: str, seed: int) -> Result | None:
    method = METHODS[arm]
    own = [*DATA["synthetic"][0], *method.rates["synthetic"], ROWWISE]

    def make() -> Result:
        with _days(bench, "synthetic", seed, INCREMENTAL) as days:
            found = follow(days, method, own, seed, bench.process, len(days.names), SETTLED)
        counted = found[SETTLED - 1 :]
        return {
            "auc": statistics.fmean(one["auc"] for one in counted),
            "a day": statistics.fmean(one["seconds"] for one in counted),
        }

    return bench.once(f"incremental/{arm}-{seed}", {"days": INCREMENTAL, "overrides": own}, make)


@contextmanager
def _days(
    bench: Bench, data: str, seed: int, size: Mapping[str, int], logs: Path | None = None, *, in_pieces: bool = False
) -> Iterator[Days]:
    """Yield days of a data set, synthetic ones drawn by the seed; `in_pieces`: a first part and 100 pieces."""
    options = argparse.Namespace(data=data, data_seed=seed, input=str(logs), online=in_pieces, **size)
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        yield make_days(options, Path(folder), DATA[data][1])


def _row(
    claim: str, paper: str, where: str, sides: Mapping[str, Sequence[Result | None]], margin: float | None = None
) -> Row:
    """Return the line of a claim on two sides' AUC, the first one's minus the second one's."""
    runs: list[list[dict[str, Any]]] = [[one for one in side if one is not None] for side in sides.values()]
    if any(len(one) < len(side) for one, side in zip(runs, sides.values(), strict=True)):
        return absent(claim, paper, where, "not run")
    auc = [[one["auc"] for one in results] for results in runs]
    found = paired(*auc)
    ours = ", ".join(f"{name} {statistics.fmean(one):.4f}" for name, one in zip(sides, auc, strict=True))
    return Row(claim, paper, where, ours, written(found), verdict(found, margin))
