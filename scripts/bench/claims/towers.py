"""The claims of DeepFM, AutoInt, the PNN family and FGCNN: which tower is above which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tessera.scripts.bench.claims import teachers
from tessera.scripts.bench.claims.bench import Arm, Bench, Row, Rows, copied
from tessera.scripts.bench.claims.teachers import Teacher

HIDDEN = "model.hidden=[64,32]"
TEACHERS = {
    "low and high orders": Teacher(shares={"first": 0.3, "pairs": 0.35, "own": 0.35}),
    "pairs in ways of their own": Teacher(60_000, 10, 40, shares={"first": 0.2, "own": 0.8}),
    "neighbours": Teacher(shares={"first": 0.2, "pairs": 0.3, "neighbours": 0.5}),
    "far fields": Teacher(shares={"first": 0.2, "pairs": 0.3, "far": 0.5}),
}


def arm(name: str, model: str, *more: str, after: Arm | None = None) -> Arm:
    return Arm(name, (f"model={model}", *more), after=after)


FM = arm("FM", "fm")
DNN = arm("DNN", "dnn", HIDDEN)
FNN = arm("FNN", "wide_deep", HIDDEN, after=FM)
WIDE_DEEP = arm("Wide&Deep", "wide_deep", HIDDEN)
DEEPFM = arm("DeepFM", "deepfm", HIDDEN)
LONG_DEEPFM = arm("DeepFM, 12 passes", "deepfm", HIDDEN, "trainer.epochs=12")
ATTENTION = ("model.layers=2", "model.attention_dim=32")
AUTOINT = arm("AutoInt", "autoint", *ATTENTION)
NO_RESIDUAL = arm("AutoInt without residual", "autoint", *ATTENTION, "model.residual=false")
IPNN = arm("IPNN", "ipnn", HIDDEN)
OPNN = arm("OPNN", "opnn", HIDDEN)
KPNN = arm("KPNN", "kpnn", "model.kernel=mat", HIDDEN)
PIN = arm("PIN", "pin", HIDDEN)
FGCNN = arm("FGCNN", "fgcnn", "model.channels=[6,8]", "model.kernel=3", "model.classifier.hidden=[64,32]")


def drawn(name: str, epochs: int) -> Rows:
    """Return the rows of one of `TEACHERS`: other ones for each seed."""
    teacher = TEACHERS[name]
    own = ["data=synthetic", *teachers.overrides(teacher), "trainer.batch_size=1024", f"trainer.epochs={epochs}"]
    own += ["trainer.early_stop.patience=1", "optimizer.dense.lr=0.003", "embedding.init_std=0.1"]

    def make(seed: int, folder: Path) -> object:
        return teachers.write(teacher, seed, folder)

    return Rows(name, make, tuple(own), teachers.described(teacher))


def movielens(logs: Path | None) -> Rows:
    folder = (logs or Path("data")) / "ml-100k-random"
    own = ("data=ml100k", "trainer.batch_size=1024", "trainer.epochs=20", "trainer.early_stop.patience=2")
    return Rows("MovieLens", copied(folder), own, {"rows": "ml-100k-random"}, own_seeds=False, needs=folder)


def deepfm(bench: Bench, logs: Path | None) -> list[Row]:
    rows = []
    paper = {"Wide&Deep": "+0.0026 (Criteo)", "FM": "+0.0115", "FNN": "+0.0044", "DNN": ""}
    for where in (drawn("low and high orders", 6), movielens(logs)):
        for worse in (FM, WIDE_DEEP, DNN, FNN):
            rows.append(bench.compared(f"DeepFM above {worse.name}", paper[worse.name], where, DEEPFM, worse))
    as_long = "DeepFM above FNN, in as many passes as FNN and its FM have"
    rows.insert(4, bench.compared(as_long, "", drawn("low and high orders", 6), LONG_DEEPFM, FNN))
    return rows


def autoint(bench: Bench, logs: Path | None) -> list[Row]:
    rows = []
    for where, without in ((drawn("low and high orders", 6), ""), (movielens(logs), "+0.0161 (MovieLens-1M)")):
        above = "AutoInt above itself without the residual"
        rows.append(bench.compared(above, without or "+0.0028 (Criteo)", where, AUTOINT, NO_RESIDUAL))
        rows.append(bench.compared("AutoInt above FM", "+0.0204 (MovieLens-1M)", where, AUTOINT, FM))
    return rows


def products(bench: Bench, logs: Path | None) -> list[Row]:
    # PIN takes several times as long as the others, so that none is tuned here.
    pin, kpnn, ipnn, opnn, dnn = (
        replace(one, overrides=(*one.overrides, "optimizer.sparse.lr=0.003"), grid={})
        for one in (PIN, KPNN, IPNN, OPNN, DNN)
    )
    pairs = ((pin, kpnn), (kpnn, ipnn), (kpnn, opnn), (pin, ipnn), (pin, dnn), (ipnn, dnn))
    where = drawn("pairs in ways of their own", 8)
    return [bench.compared(f"{one.name} above {other.name}", "", where, one, other) for one, other in pairs]


def fgcnn(bench: Bench, logs: Path | None) -> list[Row]:
    sets = (drawn("neighbours", 8), drawn("far fields", 8))
    return [bench.compared("generated features lift IPNN", "", where, FGCNN, IPNN) for where in sets]
