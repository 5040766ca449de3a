"""Fits of an experiment: what is there is not done again, and the best setting is that of the best fit."""

from __future__ import annotations

from tessera.scripts.bench.fits import Fits, in_words, mean_and_spread


def test_a_result_that_is_there_is_not_made_again_unless_it_was_made_of_something_else(tmp_path):
    made = []

    def make() -> dict:
        made.append(1)
        return {"watched": len(made)}

    assert Fits(tmp_path, read_only=True).once("seed-1/din", {"rows": 5}, make) is None
    assert Fits(tmp_path).once("seed-1/din", {"rows": 5, "grid": (1, 2)}, make) == {"watched": 1}
    assert Fits(tmp_path).once("seed-1/din", {"rows": 5, "grid": (1, 2)}, make) == {"watched": 1}
    assert Fits(tmp_path, read_only=True).once("seed-1/din", {"rows": 5, "grid": (1, 2)}, make) == {"watched": 1}
    assert Fits(tmp_path).once("seed-1/din", {"rows": 6, "grid": (1, 2)}, make) == {"watched": 2}
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["din.json"]


def test_the_best_setting_is_that_of_the_best_fit_and_none_while_one_is_missing(tmp_path):
    fits = Fits(tmp_path)

    def fit(name, setting):
        return fits.once(name, setting, lambda: {"watched": -abs(setting["lr"] - 0.02) + setting["dropout"]})

    grid = {"lr": (0.01, 0.02, 0.05), "dropout": (0.0, 0.3)}
    assert fits.best_setting("din", grid, fit) == {"lr": 0.02, "dropout": 0.3}
    (tmp_path / "tuning/din-0.05-0.0.json").unlink()
    fits.read_only = True
    assert fits.best_setting("din", grid, fit) is None
    assert in_words({"lr": 0.02, "dropout": 0.3}) == "lr 0.02, dropout 0.3"
    assert mean_and_spread([0.5]) == "0.5000" and mean_and_spread([1.0, 3.0], 2) == "2.00 ± 1.41"
