"""The comparison of towers gives each the same number of settings, all of them different."""

import pytest

from tessera.ctr.config import load_config
from tessera.scripts.bench.fits import Fits
from tessera.scripts.bench.towers import Experiment, settings


@pytest.mark.parametrize("tower", ["lr", "fm", "deepfm", "final_net", "autoint", "fgcnn"])
def test_a_tower_has_twenty_settings_that_it_can_be_built_with(tower):
    found = settings(tower)
    assert len(found) == len({*found}) == (10 if tower == "lr" else 20)
    for setting in (found[0], found[-1]):
        load_config([f"model={tower}", *setting], "")
    assert any("l2=" in one for one in found[1]) == (tower in ("lr", "fm", "autoint"))


def test_the_best_on_valid_rows_is_trained_with_the_other_seeds(tmp_path):
    fits = Experiment(Fits(tmp_path), {}, 0, None)
    tried = []

    def fitted(of, tower, setting, seed):
        tried.append((settings(tower).index(setting), seed))
        auc = {0: 0.7, 1: 0.9, 2: 0.8}[tried[-1][0]]
        split = {"auc": auc + seed / 100, "logloss": 0.5}
        return {"valid": split, "test": split}

    fits._fitted = fitted
    mean, line = fits.row("MovieLens", "dnn", 3, [1, 2])
    assert tried == [(0, 1), (1, 1), (2, 1), (1, 2)] and mean == pytest.approx(0.915)
    assert line.startswith("| MovieLens | dnn | 0.9150 ± 0.0071 | 0.5000 ± 0.0000 | 0.9150 ± 0.0071 | sparse.lr=0.003")
