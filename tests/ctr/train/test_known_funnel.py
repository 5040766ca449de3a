"""What several labels are worth on the synthetic funnel, whose truth is known: the bench of it, small."""

from __future__ import annotations

import argparse

import pytest

from tessera.scripts.bench.fits import Fits, Result
from tessera.scripts.bench.funnel import BUY_WEIGHT, CLICKS, PURCHASES, Experiment

RATES = {"optimizer.sparse.lr": 0.002}


@pytest.mark.slow
def test_purchases_are_learnt_from_all_rows_better_than_from_clicked_ones(process, tmp_path):
    """ESMM and MMoE rank what all rows would buy far better than a model of clicked rows, and clicks about as a model
    of clicks does; nothing passes the ceiling."""
    chosen = argparse.Namespace(rows=36_000, users=300, items=200, epochs=3)
    bench = Experiment(Fits(tmp_path / "fits"), tmp_path, process, chosen)

    def found(model: str, **more: float) -> Result:
        result = bench.fit(model, model, 1, RATES | more, test=True)
        assert result is not None
        return result

    clicks, purchases, esmm = found(CLICKS), found(PURCHASES), found("ESMM")
    mmoe = found("MMoE", **{BUY_WEIGHT: 1.0})
    ceilings = bench.ceilings(1)
    assert ceilings is not None
    for model in (esmm, mmoe):
        assert model["buy_on_all_rows"] > purchases["buy_on_all_rows"] + 0.02
        assert model["click"] > clicks["click"] - 0.01
        assert all(model[name] < ceilings[name] for name in ("click", "buy_on_all_rows", "click_and_buy"))
    assert purchases["buy_on_all_rows"] > 0.6, "it has learnt, too"
