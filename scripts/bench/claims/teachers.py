"""Synthetic rows whose truth has the interactions that a claim is about, in shares that are chosen.

    logit = bias + sum of parts, each scaled to its share of the logit's variance
    first:      sum_m w(id_m)
    pairs:      sum_{i<j} <v(id_i), v(id_j)>, v of length 3                 what a factorization machine says
    own:        sum_{i<j} a_ij cos(p_ij . z(id_i) - q_ij . z(id_j) + c_ij)  each pair of fields in its own way
    steps:      sum_{i<j} a_ij sign(p_ij . z(id_i) - q_ij . z(id_j) + c_ij)   less what either id says alone
    neighbours: sum_m b_m u(id_m) u(id_m+1) u(id_m+2), u of mean 0          three fields beside each other
    far:        the same of fields m, m + 3 and m + 6 (in a circle)         three fields far from each other

Vectors of ids are drawn once from the seed, so rows of one seed have one truth. Fields have few ids, each seen often:
what is to be learnt is how fields act together, not rare ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tessera.ctr.metrics.exact import auc

LATENT = 2  # length of z
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Teacher:
    """rows: of all splits. ids: of each field. shares: part -> share of the variance, which add up to 1. signal:
    standard deviation of the logit. held_out: share of the rows that valid has, and test. frequency: of the cosines."""

    rows: int = 60_000
    fields: int = 8
    ids: int = 40
    zipf: float = 0.6
    shares: Mapping[str, float] = field(default_factory=lambda: {"first": 0.4, "pairs": 0.6})
    signal: float = 2.0
    held_out: float = 0.15
    frequency: float = 2.0


def names(teacher: Teacher) -> list[str]:
    return [f"F{number}" for number in range(1, teacher.fields + 1)]


def overrides(teacher: Teacher) -> list[str]:
    """Return what the configuration of a run says about these rows, but for their path."""
    features = ",".join(f"{{name:{name},kind:id,dtype:int}}" for name in names(teacher))
    return [f"data.schema.features=[{features}]", "data.schema.time=null", "embedding.clock=wall", "data.name=teacher"]


def write(teacher: Teacher, seed: int, folder: Path) -> float:
    """Write train, valid and test; return the AUC of the true probabilities on test, which no model can beat but by
    luck."""
    random = np.random.default_rng([seed, 77])
    weights = (1.0 + np.arange(teacher.ids)) ** -teacher.zipf
    ids = random.choice(teacher.ids, (teacher.fields, teacher.rows), p=weights / weights.sum())
    parts = _parts(teacher, ids, random)
    logit = np.zeros(teacher.rows)
    for name, share in teacher.shares.items():
        logit += teacher.signal * share**0.5 * (parts[name] - parts[name].mean()) / parts[name].std()
    probability = 1.0 / (1.0 + np.exp(-logit))
    label = (random.random(teacher.rows) < probability).astype(np.int8)
    # Ids of a field are told apart from those of others by their thousands; nothing reads an order in them.
    columns = {
        name: column + 1000 * number for number, (name, column) in enumerate(zip(names(teacher), ids, strict=True))
    }
    table = pa.table({"label": label, **columns})
    held_out = round(teacher.rows * teacher.held_out)
    train = teacher.rows - 2 * held_out
    cuts = dict(zip(SPLITS, ((0, train), (train, train + held_out), (train + held_out, teacher.rows)), strict=True))
    for split, (first, last) in cuts.items():
        (folder / split).mkdir(parents=True)
        part = table.slice(first, last - first)
        pq.write_table(part, folder / split / "part-00000.parquet", row_group_size=max(64, part.num_rows // 16))
    test = slice(*cuts["test"])
    return float(auc(probability[test], label[test]) or 0.0)


def described(teacher: Teacher) -> dict[str, object]:
    return asdict(teacher)


def _parts(teacher: Teacher, ids: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the parts of the logit, float64 [rows] each, unscaled. All are drawn, so that shares change no vector."""
    fields = teacher.fields

    def drawn(width: int) -> np.ndarray:
        """Normal vectors of ids by row: float64 [fields, rows, width]."""
        of_ids = random.normal(size=(fields, teacher.ids, width))
        return np.stack([of_id[column] for of_id, column in zip(of_ids, ids, strict=True)])

    weights, vectors, latent = drawn(1)[:, :, 0], drawn(3), drawn(LATENT)
    signs = np.sign(drawn(1)[:, :, 0])
    signs -= signs.mean(1, keepdims=True)
    own = np.zeros(teacher.rows)
    for i in range(fields):
        for j in range(i + 1, fields):
            left, right = (random.normal(size=LATENT) * teacher.frequency / LATENT**0.5 for _ in range(2))
            phase = random.uniform(0, 2 * np.pi)
            own += random.normal() * np.cos(latent[i] @ left - latent[j] @ right + phase)
    factors = random.normal(size=fields)
    steps = _steps(teacher, ids, latent, random.spawn(1)[0]) if "steps" in teacher.shares else np.zeros(teacher.rows)
    total = vectors.sum(0)
    return {
        "first": weights.sum(0),
        "pairs": 0.5 * ((total**2).sum(1) - (vectors**2).sum((0, 2))),
        "own": own,
        "steps": steps,
        "neighbours": sum(factors[m] * signs[m] * signs[m + 1] * signs[m + 2] for m in range(fields - 2)),
        "far": sum(
            factors[m] * signs[m] * signs[(m + 3) % fields] * signs[(m + 6) % fields] for m in range(fields - 2)
        ),
    }


def _steps(teacher: Teacher, ids: np.ndarray, latent: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return which of two ids is ahead, for each pair of fields along directions of its own, float64 [rows]. Unlike a
    cosine of a difference, which is two products, a step is a sum of many: its matrix over ids has a high rank."""
    found = np.zeros(teacher.rows)
    for i in range(teacher.fields):
        for j in range(i + 1, teacher.fields):
            left, right = (random.normal(size=LATENT) for _ in range(2))
            step = np.sign(latent[i] @ left - latent[j] @ right + 0.5 * random.normal())
            for column in (ids[i], ids[j]):
                counts = np.maximum(1, np.bincount(column, minlength=teacher.ids))
                step -= (np.bincount(column, step, teacher.ids) / counts)[column]
            found += random.normal() * step
    return found
