"""Statistics of a data set: what they say, and what schemas take from them."""

import json

import numpy as np
import pyarrow as pa
import pytest
import yaml

from tessera.ctr.config import load_config
from tessera.ctr.data import column_statistics
from tessera.ctr.data.column_statistics import statistics_of
from tessera.ctr.data.config import DataConfig, schema_of
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.fitted import fill_fitted
from tessera.ctr.data.listing import list_files
from tessera.ctr.data.schema import FeatureConfig, SchemaConfig
from tessera.ctr.report.data_page import write_statistics
from tests.ctr.data.rows import features, read_in_order, write


def described(path: str) -> dict:
    return {name: one.described() for name, one in statistics_of(list_files(path).files).items()}


def test_small_columns_are_described_exactly(tmp_path):
    draw = np.random.default_rng(0)
    x, ids = draw.normal(3, 2, 5000), draw.integers(-40, 40, 5000)
    nulls = draw.random(5000) < 0.1
    data = {
        "x": pa.array(x, mask=nulls),
        "id": pa.array(ids),
        "s": pa.array([f"s{i}" for i in ids]),
        "tags": pa.array([[1, 2], None, [2], []] * 1250, pa.list_(pa.int64())),
        "when": pa.array(ids, pa.timestamp("ms")),
        "none": pa.nulls(5000),
    }
    table = pa.table(data)
    found = described(write(tmp_path, table.slice(0, 1700), table.slice(1700), row_group_size=900))
    seen = x[~nulls]
    assert found["x"]["mean"] == pytest.approx(seen.mean(), rel=1e-12)
    assert found["x"]["std"] == pytest.approx(seen.std(), rel=1e-12)
    assert np.allclose(found["x"]["quantiles"], np.quantile(seen, np.linspace(0, 1, 1001)))
    assert found["x"]["nulls"] == nulls.sum() and found["x"]["null_rate"] == pytest.approx(nulls.mean())
    assert found["id"]["distinct"] == found["s"]["distinct"] == 80 and found["s"].keys().isdisjoint({"mean"})
    counts = np.unique(ids, return_counts=True)[1]
    assert found["id"]["ids_at_least"]["50"] == (counts >= 50).sum()
    assert (found["tags"]["items_per_row"], found["tags"]["longest"], found["tags"]["distinct"]) == (0.75, 2, 2)
    assert found["tags"]["nulls"] == 1250 and found["tags"]["ids_at_least"]["100"] == 2
    assert found["when"] == {"type": "timestamp[ms]", "nulls": 0, "null_rate": 0.0}
    assert found["none"]["null_rate"] == 1


def test_large_columns_are_sampled_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(column_statistics, "KEPT", 2000)
    draw = np.random.default_rng(1)
    ids = (draw.pareto(1, 60_000) * 500).astype(np.int64)
    path = write(tmp_path, {"x": draw.normal(size=60_000), "id": ids}, row_group_size=7000)
    files = statistics_of(list_files(path).files)
    assert len(files["x"].numbers._values) == len(files["id"].ids.keys) == 2000
    one = files["x"].described()
    assert one["quantiles"][500] == pytest.approx(0, abs=0.12) and one["quantiles"][900] == pytest.approx(
        1.2816, abs=0.2
    )
    values, counts = np.unique(ids, return_counts=True)
    found = files["id"].described()
    assert found["distinct"] == pytest.approx(len(values), rel=0.08)
    assert found["ids_at_least"]["5"] == pytest.approx((counts >= 5).sum(), rel=0.15)
    assert described(path) == {name: one.described() for name, one in files.items()}, "the same again"


def test_drift(tmp_path):
    draw = np.random.default_rng(2)
    before = {"x": draw.normal(size=8000), "y": draw.normal(size=8000), "id": np.arange(8000) % 100}
    after = {"x": draw.normal(size=8000), "y": draw.normal(1, 1, size=8000), "id": 20 + np.arange(8000) % 100}
    old, new = write(tmp_path / "old", before), write(tmp_path / "new", after)
    told = write_statistics([new], [old], tmp_path / "out")
    drift = {name: one["drift"] for name, one in told["columns"].items()}
    assert drift["x"]["psi"] < 0.02 < 0.5 < drift["y"]["psi"] < 1.5
    assert drift["id"]["new_ids"] == drift["id"]["new_id_rows"] == pytest.approx(0.2)
    written = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert written["columns"]["y"]["drift"]["psi"] == pytest.approx(drift["y"]["psi"], rel=1e-4)
    page = (tmp_path / "out" / "statistics.html").read_text()
    assert "mathdefault" not in page, "numbers of a logarithmic axis in TeX"
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "Drift" in page
    assert page.index(">y<") < page.rindex(">x<")


def test_files_with_other_columns_are_an_error(tmp_path):
    path = write(tmp_path, {"a": [1], "b": [1]}, {"a": [1]})
    with pytest.raises(DataError, match="column 'b' is not in this file and in"):
        statistics_of(list_files(path).files)


def filled(statistics: str | None, *features: str) -> list[FeatureConfig]:
    made = [FeatureConfig(**yaml.safe_load(feature)) for feature in features]
    data = DataConfig(name="t", path="t", statistics=statistics, schema=SchemaConfig(features=made))
    fill_fitted(data)
    assert schema_of(data).stored
    return data.schema.features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    x = np.arange(1001.0)
    data = {"x": x, "one": np.full(1001, 3.0), "s": [f"{i}" for i in x], "zeros": np.where(x < 990, 0, x)}
    write_statistics([write(folder / "data", data)], None, folder / "out")
    return folder / "out"


def test_a_schema_takes_its_numbers_from_them(folder):
    names = [
        "{name: x, kind: numeric, transform: standardise, fitted: true}",
        "{name: m, kind: numeric, column: x, transform: min_max, fitted: true, clip_quantiles: [0.1, 0.9]}",
        "{name: c, kind: numeric, column: x, transform: standardise, fitted: true, clip: [0, 500]}",
        "{name: b, kind: numeric, column: x, transform: bucketise, quantiles: 20}",
        "{name: z, kind: numeric, column: zeros, transform: bucketise, quantiles: 500}",
    ]
    x, m, c, b, z = filled(f"{folder}/statistics.json", *names)
    assert (x.mean, x.std, x.fitted) == (500, pytest.approx(np.arange(1001).std()), False)
    assert (m.clip, m.min, m.max, m.clip_quantiles) == ([100, 900], 100, 900, [])
    clipped = np.clip(np.arange(1001.0), 0, 500)
    assert (c.mean, c.std) == (pytest.approx(clipped.mean(), rel=2e-3), pytest.approx(clipped.std(), rel=2e-3))
    assert b.boundaries == pytest.approx(list(range(50, 1000, 50))) and b.quantiles is None
    assert z.boundaries[0] > 900 and len(z.boundaries) < 10, "buckets that would be the same are one"


MISTAKES = {
    "{name: x, kind: numeric, fitted: true}": ["'x'", "fitted", "standardise"],
    "{name: xx, kind: numeric, transform: standardise, fitted: true}": ["'xx'", "statistics.json", "did you mean 'x'"],
    "{name: s, kind: numeric, transform: standardise, fitted: true}": ["no numbers of column 's'", "string"],
    "{name: one, kind: numeric, transform: min_max, fitted: true}": ["'one'", "one value alone, 3"],
    "{name: x, kind: numeric, quantiles: 20}": ["quantiles", "bucketise"],
    "{name: x, kind: numeric, transform: bucketise, quantiles: 1}": ["quantiles 1", "2 to 1000"],
    "{name: x, kind: numeric, transform: bucketise, quantiles: 4, boundaries: [1]}": ["quantiles and boundaries"],
    "{name: zeros, kind: numeric, transform: bucketise, quantiles: 4}": ["nearly always 0"],
    "{name: x, kind: numeric, clip_quantiles: [0.9, 0.1]}": ["clip_quantiles [0.9, 0.1]", "rising shares"],
    "{name: x, kind: numeric, clip_quantiles: [0.1, 0.9], clip: [0, 1]}": ["clip and clip_quantiles"],
}


@pytest.mark.parametrize("feature", MISTAKES)
def test_a_mistake_is_one_line(folder, feature):
    with pytest.raises(SchemaError) as caught:
        filled(f"{folder}/statistics.json", feature)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in MISTAKES[feature])


def test_files_that_are_no_statistics(folder, tmp_path):
    feature = "{name: x, kind: numeric, transform: standardise, fitted: true}"
    with pytest.raises(SchemaError, match="data.statistics: .* cannot be read"):
        filled(f"{tmp_path}/statistics.json", feature)
    (tmp_path / "statistics.json").write_text("[]")
    with pytest.raises(SchemaError, match="is no statistics.json of"):
        filled(f"{tmp_path}/statistics.json", feature)
    with pytest.raises(SchemaError, match="'x': fitted is set, but data.statistics is null"):
        filled(None, feature)
    with pytest.raises(SchemaError, match="data.statistics: .* cannot be read"):
        load_config(["data=synthetic", "data.statistics=nowhere", f"data.schema.features=[{feature}]"], "")


def test_clip(tmp_path):
    data = {"label": pa.array([0.0] * 4), "x": pa.array([-5, 3, 50, None]), "y": pa.array([1.0, 2.0, 200.0, 7.0])}
    path = write(tmp_path, data)
    schema = features(
        {"name": "x", "kind": "numeric", "clip": [0, 10], "missing": -1},
        {"name": "y", "kind": "numeric", "clip": [0, 100], "transform": "log1p"},
        {
            "name": "b",
            "kind": "numeric",
            "column": "x",
            "clip": [0, 10],
            "transform": "bucketise",
            "boundaries": [-1, 20],
        },
    )
    rows = read_in_order(path, schema)
    assert [row["numeric"][0] for row in rows] == [0, 3, 10, -1]
    assert [row["numeric"][1] for row in rows] == pytest.approx(np.log1p([1, 2, 100, 7]))
    assert [row["ids"]["b"] for row in rows] == [[1], [1], [1], []]
    infinite = write(tmp_path / "infinite", data | {"y": pa.array([1.0, 2.0, float("inf"), 7.0])})
    with pytest.raises(DataError, match="'y' found inf"):
        read_in_order(infinite, schema)
    for clip, words in ([1, 1], "clip"), ([3], "clip"), ([0, float("nan")], "finite"):
        with pytest.raises(SchemaError, match=words):
            features({"name": "x", "kind": "numeric", "clip": clip})
    with pytest.raises(SchemaError, match="'a': clip is set, but"):
        features({"name": "a", "clip": [0, 1]})
    with pytest.raises(SchemaError, match="fitted is set, but data.statistics, which has its numbers, was not read"):
        features({"name": "x", "kind": "numeric", "transform": "standardise", "fitted": True})
