"""Real logs, from text files through their converters to a trained model and its report."""

import json
import os
from pathlib import Path

import pytest

from tests.ranks import ROOT, run_script

SHARED = Path(os.environ.get("TESSERA_SHARED", ROOT / ".." / "shared")) / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the small real data sets are not at {SHARED}")
SMALL = ["model.hidden=[32]", "embedding.rows=5000", "trainer.batch_size=256", "trainer.epochs=2"]


def prepare(*arguments: str) -> None:
    done = run_script("scripts/prepare.py", *arguments)
    assert done.returncode == 0, done.stderr


def split_files(folder: Path) -> list[str]:
    pairs = {"--train": "train.csv", "--valid": "dev.csv", "--test": "test.csv"}
    return [part for option, name in pairs.items() for part in (option, str(folder / name))]


@pytest.mark.parametrize(
    ("kind", "sample", "rows", "least_auc"),
    [("criteo", "criteo-sample", 391, 0.6), pytest.param("avazu", "avazu-sample", 432, 0.6, marks=pytest.mark.slow)],
)
def test_samples_train_end_to_end(tmp_path, kind, sample, rows, least_auc):
    prepare(kind, *split_files(SHARED / sample), "--output", str(tmp_path / "data"))
    options = [f"data={kind}", f"data.path={tmp_path}/data", f"trainer.run_dir={tmp_path}/run", *SMALL]
    done = run_script("scripts/train.py", *options, world=2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"] == rows
    assert report["auc"] > least_auc


@pytest.mark.slow
def test_movielens_trains_from_its_ratings(tmp_path):
    prepare("movielens", "--input", str(SHARED / "ml-100k"), "--output", str(tmp_path / "data"))
    options = ["data=movielens", f"data.path={tmp_path}/data", f"trainer.run_dir={tmp_path}/run", *SMALL]
    done = run_script("scripts/train.py", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["auc"] > 0.75
    assert report["gauc"] > 0.6
