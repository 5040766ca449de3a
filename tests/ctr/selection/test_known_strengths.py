"""Every method beside the truth, on data whose fields have known strengths; and the curve over k."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.config import load_config
from tests.ranks import on_ranks

IDS, NUMBERS, VALUES = 9, 4, 60
#: Of the fields' shares of the logit; i9 and n4 are noise.
STRENGTHS = {f"i{k}": 1.1 * 0.75**k for k in range(IDS)} | {f"n{k}": 0.95 * 0.68**k for k in range(NUMBERS)}
NOISE = ("i9", "n4")
#: The runs, with what 160 steps need: AutoField's p moves with every second of them.
GATES: dict[str, list[str]] = {
    "none": [],
    "dropout": [],
    "lpfs": [],
    "autofield": ["selection.every=2", "selection.lr=0.05", "selection.cooling=0.005"],
    "optfs": ["selection.sharpest=10", "selection.sharpening_steps=160"],
}
TRAIN, VALID = 80_000, 20_000


def write_known(folder: Path, seed: int = 4) -> dict[str, float]:
    """Write a train and a valid split; return the true share of each field: half the mean square by which the logit
    changes when the field's values are permuted, pairs included."""
    drawn = np.random.default_rng(seed)
    weights = {name: drawn.normal(size=VALUES) for name in STRENGTHS if name[0] == "i"}
    weights = {name: (w - w.mean()) / w.std() for name, w in weights.items()}

    def logit_of(columns: dict[str, np.ndarray]) -> np.ndarray:
        parts = {n: s * (weights[n][columns[n]] if n[0] == "i" else columns[n]) for n, s in STRENGTHS.items()}
        return sum(parts.values()) + 0.5 * parts["i0"] * parts["i2"] - 0.8

    def columns_of(rows: int) -> dict[str, np.ndarray]:
        ids = {name: drawn.integers(0, VALUES, rows) for name in [*weights, NOISE[0]]}
        numbers = {name: drawn.normal(size=rows).astype(np.float32) for name in STRENGTHS if name[0] == "n"}
        return ids | numbers | {NOISE[1]: drawn.normal(size=rows).astype(np.float32)}

    for split, rows in (("train", TRAIN), ("valid", VALID)):
        columns = columns_of(rows)
        logit = logit_of(columns)
        label = (drawn.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table({"label": label, **columns}), folder / split / "part.parquet", row_group_size=8192)
    truth = {}
    for name in columns:
        changed = logit_of(columns | {name: drawn.permutation(columns[name])})
        truth[name] = float(np.mean((changed - logit) ** 2) / 2)
    return truth


def kendall_tau(a: dict[str, float], b: dict[str, float]) -> float:
    signs = [np.sign(a[x] - a[y]) * np.sign(b[x] - b[y]) for x, y in itertools.combinations(a, 2)]
    return float(np.mean(signs))


def rank_all(process, folder: Path) -> None:
    from tessera.ctr.runs.score import run_config
    from tessera.ctr.selection.ranked_run import rank_run
    from tessera.ctr.train.trainer import Trainer

    numbers = [f"{{name: {name}, kind: numeric}}" for name in [*STRENGTHS, *NOISE] if name[0] == "n"]
    ids = [f"{{name: {name}}}" for name in [*STRENGTHS, *NOISE] if name[0] == "i"]
    fixed = ["data=synthetic", f"data.schema.features=[{','.join(numbers + ids)}]", "data.test=null"]
    fixed += ["data.schema.time=null", f"data.path={folder / 'data'}", "trainer.device=cpu", "trainer.threads=1"]
    fixed += ["model.hidden=[32]", "model.embedding_dim=8", "trainer.batch_size=1000", "trainer.epochs=2"]
    fixed += ["trainer.checkpoint.every=100000", "trainer.log_every=60"]
    for method in GATES:
        gates = [f"selection.method={method}", "optimizer.dense.lr=0.003", *GATES[method]]
        Trainer(load_config([*fixed, *gates, f"trainer.run_dir={folder / method}"], ""), process).fit()
    run = folder / "none"
    for method in ("permutation", "taylor", "sfs"):
        rank_run(run_config(run, ["trainer.batch_size=5000"]), process, run, method, "valid", 3)


def draw_curve(process, folder: Path) -> None:
    from tessera.ctr.runs.score import run_config
    from tessera.ctr.selection.curve import run_curve

    run = folder / "none"
    run_curve(run_config(run, []), process, run, "permutation", [2, 5, 9, 15])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_methods_find_the_fields_known_strengths(tmp_path, capsys):
    truth = write_known(tmp_path / "data")
    on_ranks(1, rank_all, tmp_path)
    on_ranks(1, draw_curve, tmp_path)
    found = {}
    for method in ("permutation", "taylor", "sfs", *list(GATES)[1:]):
        run = tmp_path / (method if method in GATES else "none")
        told = json.loads((run / "importance" / method / "importance.json").read_text())
        found[method] = {one["name"]: one["importance"] for one in told["fields"]}
    taus = {method: kendall_tau(truth, values) for method, values in found.items()}
    curve = json.loads((tmp_path / "none" / "importance" / "permutation-curve" / "curve.json").read_text())
    aucs = {point["fields"]: point["splits"]["valid"]["auc"] for point in curve["points"]}
    with capsys.disabled():
        print(f"\n{'field':8}{'truth':>10}" + "".join(f"{method:>13}" for method in found))
        for name in sorted(truth, key=lambda one: -truth[one]):
            print(f"{name:8}{truth[name]:10.5f}" + "".join(f"{values[name]:13.6f}" for values in found.values()))
        print(f"{'tau':18}" + "".join(f"{tau:13.3f}" for tau in taus.values()))
        print("auc over fields: " + ", ".join(f"{count}: {auc:.4f}" for count, auc in aucs.items()))
    for method in ("permutation", "taylor", "dropout"):
        assert taus[method] >= 0.8, (method, taus)
        least = sorted(found[method], key=lambda one: found[method][one])[:2]
        assert set(least) == set(NOISE), (method, least)
    assert aucs[2] < aucs[5] < aucs[9]
    lines = [json.loads(line) for line in (tmp_path / "none" / "metrics.jsonl").read_text().splitlines()]
    assert aucs[15] == [line for line in lines if line["kind"] == "eval"][-1]["auc"]  # all fields: the run itself
