"""An export scores as evaluation does: every model, every kind of table, on awkward rows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from tessera.ctr.data.config import schema_of
from tessera.ctr.export.export import EQUAL_NUMBERS, prepared
from tessera.ctr.export.golden import scores_of
from tessera.ctr.network import build_model
from tessera.ctr.runs.saved_model import load_model
from tessera.ctr.runs.score import run_config
from tessera.ctr.serving import Scorer
from tessera.ctr.serving.scorer import differences
from tests.ctr.export.models import awkward_rows, export, make_run, overrides_of
from tests.ctr.models.names import MODELS, OF_ONE_LABEL, OVER_LABELS
from tests.distributed.saved_tables import alone
from tests.ranks import on_ranks

QUICK_CASES = ("oov, projections, pooled by owners",)  # the others, and every model, by -m slow
CASES = {
    "oov, projections, pooled by owners": (
        "embedding.oov=learned",
        "embedding.tables={c: {dim: 2}}",
        "embedding.pooled_output_dist=always",
        "numeric=autodis",
        "data.drop=[e,h]",  # e is crossed
    ),
    "static": ("embedding=static",),
    "bf16 rows, batch norm": ("embedding.format=bf16", "model.batch_norm=true", "numeric=bucketised"),
    "int4 rows": ("embedding.format=int4", "model.embedding_dim=16", "numeric=raw"),
    "mixed formats": ("embedding.formats={d.v: int8, c: fp16, words.w: bf16, s.v: int2}", "model.embedding_dim=16"),
    "amp": ("trainer.amp=true",),
}


@pytest.fixture(scope="module")
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield alone()
    dist.destroy_process_group()


def evaluated(process, folder: Path, rows) -> np.ndarray:
    """What the model of the run gives, all of its rows loaded."""
    config = prepared(run_config(folder / "run", []))
    model, _ = build_model(config, schema_of(config.data), process)
    load_model(model, folder / "run" / "best", process)
    return scores_of(model, config, rows)


def check(process, folder: Path, bound: float = 1e-6, **options) -> Scorer:
    exported = export(process, folder, **options)
    assert options or exported.difference <= bound, exported.difference
    scorer, rows = Scorer.load(folder / "export", check=True), awkward_rows(300, seed=5)
    difference = differences(scorer(rows), evaluated(process, folder, rows)).max()
    assert difference <= bound, difference
    ranked_as_rows_are(scorer)
    return scorer


def ranked_as_rows_are(scorer: Scorer) -> None:
    """Candidates of one user have, bit for bit, the scores of rows with the user's columns in each."""
    rows = awkward_rows(30, seed=7).to_pylist()
    user = {name: rows[0][name] for name in ("x", "y", "s", "h", "words", "c")}
    candidates = [{name: value for name, value in row.items() if name not in user} for row in rows]
    assert scorer.rank(user, candidates).tolist() == scorer([row | user for row in rows]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("model", OF_ONE_LABEL)
def test_every_model(process, tmp_path, model):
    make_run(process, tmp_path, overrides_of(tmp_path, model=model))
    check(process, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_several_labels(process, tmp_path, model):
    funnel = model in OVER_LABELS
    labels = "[label, {name: buy, where: label}]" if funnel else "[label, {name: price, loss: mse}, buy]"
    make_run(process, tmp_path, overrides_of(tmp_path, f"data.schema.labels={labels}", model=model))
    scorer = check(process, tmp_path, 1e-6 if funnel else EQUAL_NUMBERS)
    found = scorer(awkward_rows(9))
    assert found.shape == (9, len(scorer.labels)) and scorer([]).shape == (0, len(scorer.labels))


@pytest.mark.parametrize("case", [c if c in QUICK_CASES else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_every_kind_of_table(process, tmp_path, case):
    make_run(process, tmp_path, overrides_of(tmp_path, *CASES[case]))
    check(process, tmp_path, 2e-2 if case == "amp" else 1e-6)


@pytest.mark.slow
def test_a_dropped_feature_is_in_no_part_of_an_export(process, tmp_path):
    make_run(process, tmp_path, overrides_of(tmp_path, "data.drop=[e,y,tags,c]", model="fm"))
    scorer = check(process, tmp_path)
    assert scorer.columns == ["c", "d", "e", "h", "last", "s", "v", "words", "x", "y"], (
        "crosses read c and e, and z reads y"
    )
    assert not [one.name for one in scorer.description.features if one.name in ("y", "tags")]


BOUNDS = {"fp16": 2e-3, "bf16": 2e-2, "int8": 2e-2, "int4": 3e-1}


@pytest.mark.slow
def test_other_formats_stay_within_their_errors_and_are_told(process, tmp_path):
    make_run(process, tmp_path, overrides_of(tmp_path, "model.embedding_dim=16", "data.drop=[v]", model="fm"))
    rows = awkward_rows(200, seed=3)
    expected = evaluated(process, tmp_path, rows)
    for format in BOUNDS:
        exported = export(process, tmp_path, format, format=format)
        assert {group for _, group in exported.errors} == {"v"}  # a row of w would not become smaller
        assert "rms error" in exported.lines()[0]
        found = Scorer.load(tmp_path / format)(rows)
        assert 0 < np.abs(found - expected).max() < BOUNDS[format], format


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "tables").rglob("*.npy"))
    }


def _trained(process, folder: str, overrides: list[str]) -> None:
    make_run(process, Path(folder), overrides)


@pytest.mark.slow
def test_tables_are_the_same_bytes_whatever_the_ranks_of_training(process, tmp_path):
    options = ("embedding.oov=learned",)
    for name, world in (("one", 1), ("two", 2)):
        overrides = overrides_of(tmp_path / name, *options)
        if world == 1:
            make_run(process, tmp_path / name, overrides)
        else:
            on_ranks(world, _trained, str(tmp_path / name), overrides)
        check(process, tmp_path / name)
    assert digest(tmp_path / "one" / "export") == digest(tmp_path / "two" / "export") != {}


def test_scores_above_one_differ_by_shares():
    found, expected = np.array([[0.5, 2000.0], [-0.5, -4.0]]), np.array([[0.25, 1000.0], [0.5, -5.0]])
    np.testing.assert_allclose(differences(found, expected), [[0.25, 1.0], [1.0, 0.2]])
