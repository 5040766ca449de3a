"""Data frames are scored as the tables that they hold, by an export and by the API."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from tessera.ctr import api
from tessera.ctr.serving import RowError, Scorer
from tests.ctr.export.models import awkward_rows, export, make_run, overrides_of
from tests.distributed.saved_tables import alone

pandas = pytest.importorskip("pandas", reason="pandas is not installed; Arrow tables are what it is turned into")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        make_run(alone(), folder, overrides_of(folder, model="fm"))
        export(alone(), folder)
    finally:
        dist.destroy_process_group()
    return folder


def test_a_scorer_takes_a_data_frame(folder):
    scorer, rows = Scorer.load(folder / "export"), awkward_rows(50, seed=3)
    expected = scorer(rows)
    frame = rows.to_pandas(types_mapper=pandas.ArrowDtype)
    np.testing.assert_array_equal(scorer(frame), expected)
    shuffled = frame.sample(frac=1, random_state=1)  # an index that is not 0, 1, ..
    np.testing.assert_array_equal(scorer(shuffled), expected[shuffled.index])
    full = rows.filter(rows["c"].is_valid()).filter(rows.filter(rows["c"].is_valid())["d"].is_valid())
    plain = full.to_pandas()  # numpy's dtypes: strings and lists are objects, a missing one is None
    np.testing.assert_array_equal(scorer(plain), scorer(full))
    np.testing.assert_array_equal(scorer.rank(plain[:1][["x", "s"]], plain.drop(columns=["x", "s"])[:4]).shape, (4,))
    assert scorer(frame[:0]).shape == (0,)


def test_what_a_frame_holds_wrongly_is_one_line(folder):
    scorer, rows = Scorer.load(folder / "export"), awkward_rows(20)
    frame = rows.to_pandas(types_mapper=pandas.ArrowDtype)
    for bad, line in (
        (rows.to_pandas(), "integers with missing values must be stored as nullable integers"),
        (frame.drop(columns=["h"]), "column 'h' .* found nowhere"),
        (frame.assign(c=0.5), "column 'c'"),
        (frame.assign(s=[1, "a"] * 10), "cannot be read as a table"),
    ):
        with pytest.raises(RowError, match=line) as error:
            scorer(bad)
        assert "\n" not in str(error.value)


def test_the_api_takes_a_data_frame(folder):
    rows = awkward_rows(40, seed=5)
    frame = rows.to_pandas(types_mapper=pandas.ArrowDtype)
    frame["request"] = range(40)
    found = api.score(folder / "run", frame, keep="request")
    np.testing.assert_array_equal(found["request"].to_numpy(), np.arange(40))
    expected = api.score(folder / "run", rows)["prediction"].to_numpy()
    np.testing.assert_array_equal(found["prediction"].to_numpy(), expected)
    np.testing.assert_allclose(expected, Scorer.load(folder / "export")(rows), rtol=0, atol=1e-6)
