"""The claims of DeepFM, AutoInt, the PNN family and FGCNN: which tower is above which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tessera.scripts.bench.claims import teachers
from tessera.scripts.bench.claims.bench import Arm, Bench, Row, Rows, copied
from tessera.scripts.bench.claims.teachers import Teacher

LARGER_RATE = "optimizer.sparse.lr=0.01"
HIDDEN = "model.hidden=[64,32]"
ROWS = 120_000
TEACHERS = {
    "low and high orders": Teacher(ROWS, shares={"first": 0.3, "pairs": 0.35, "own": 0.35}),
    "pairs in ways of their own": Teacher(ROWS, 10, 40, shares={"first": 0.2, "own": 0.8}),
    "steps of pairs": Teacher(ROWS, 10, 40, shares={"first": 0.2, "steps": 0.8}),
    "neighbours": Teacher(ROWS, shares={"first": 0.2, "pairs": 0.3, "neighbours": 0.5}),
    "far fields": Teacher(ROWS, shares={"first": 0.2, "pairs": 0.3, "far": 0.5}),
}


def arm(name: str, model: str, *more: str, after: Arm | None = None) -> Arm:
    return Arm(name, (f"model={model}", *more), after=after)


FM = arm("FM", "fm")
DNN = arm("DNN", "dnn", HIDDEN)
FNN = arm("FNN", "wide_deep", HIDDEN, after=FM)
WIDE_DEEP = arm("Wide&Deep", "wide_deep", HIDDEN)
DEEPFM = arm("DeepFM", "deepfm", HIDDEN)
ATTENTION = ("model.layers=2", "model.attention_dim=32")
AUTOINT = arm("AutoInt", "autoint", *ATTENTION)
NO_RESIDUAL = arm("AutoInt without residual", "autoint", *ATTENTION, "model.residual=false")
IPNN = arm("IPNN", "ipnn", HIDDEN)
OPNN = arm("OPNN", "opnn", HIDDEN)
KPNN = arm("KPNN", "kpnn", "model.kernel=mat", HIDDEN)
PIN = arm("PIN", "pin", HIDDEN)
FGCNN = arm("FGCNN", "fgcnn", "model.channels=[6,8]", "model.kernel=3", "model.classifier.hidden=[64,32]")


def drawn(name: str, dense_rate: float) -> Rows:
    """Return the rows of one of `TEACHERS`: other ones for each seed. Passes are so many that training ends by itself,
    after three that are no better."""
    teacher = TEACHERS[name]
    own = ["data=synthetic", *teachers.overrides(teacher), "trainer.batch_size=512", "trainer.epochs=30"]
    own += ["trainer.early_stop.patience=3", f"optimizer.dense.lr={dense_rate}", "embedding.init_std=0.1"]

    def make(seed: int, folder: Path) -> object:
        return teachers.write(teacher, seed, folder)

    return Rows(name, make, tuple(own), teachers.described(teacher))


def low_and_high() -> Rows:
    return drawn("low and high orders", 0.003)


def movielens(logs: Path | None) -> Rows:
    folder = (logs or Path("data")) / "ml-100k-random"
    own = ("data=ml100k", "trainer.batch_size=1024", "trainer.epochs=20", "trainer.early_stop.patience=2")
    return Rows("MovieLens", copied(folder), own, {"rows": "ml-100k-random"}, own_seeds=False, needs=folder)


def deepfm(bench: Bench, logs: Path | None) -> list[Row]:
    rows = []
    paper = {"Wide&Deep": "+0.0026 (Criteo)", "FM": "+0.0115", "FNN": "+0.0044", "DNN": ""}
    for where in (low_and_high(), movielens(logs)):
        for worse in (FM, WIDE_DEEP, DNN, FNN):
            rows.append(bench.compared(f"DeepFM above {worse.name}", paper[worse.name], where, DEEPFM, worse))
    return rows


def attention(bench: Bench, logs: Path | None) -> list[Row]:
    # There both take many times as long as the others, and are not tuned.
    untuned = [replace(one, overrides=(*one.overrides, LARGER_RATE), grid={}) for one in (AUTOINT, NO_RESIDUAL)]
    sets = (
        (low_and_high(), untuned, "+0.0028 (Criteo)"),
        (movielens(logs), [AUTOINT, NO_RESIDUAL], "+0.0161 (MovieLens-1M)"),
    )
    rows = []
    for where, (autoint, no_residual), paper in sets:
        above = "AutoInt above itself without the residual"
        rows.append(bench.compared(above, paper, where, autoint, no_residual))
        rows.append(bench.compared("AutoInt above FM", "+0.0204 (MovieLens-1M)", where, autoint, FM))
    return rows


def products(bench: Bench, logs: Path | None) -> list[Row]:
    pairs = ((PIN, KPNN), (KPNN, IPNN), (KPNN, OPNN), (PIN, IPNN), (PIN, DNN), (IPNN, DNN))
    sets = (drawn("pairs in ways of their own", 0.001), pairs), (drawn("steps of pairs", 0.001), pairs[:1])
    return [
        bench.compared(f"{one.name} above {other.name}", "", where, one, other)
        for where, compared in sets
        for one, other in compared
    ]


def fgcnn(bench: Bench, logs: Path | None) -> list[Row]:
    sets = (drawn("neighbours", 0.001), drawn("far fields", 0.001))
    return [bench.compared("generated features lift IPNN", "", where, FGCNN, IPNN) for where in sets]
