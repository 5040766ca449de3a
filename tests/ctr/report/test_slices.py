"""Metrics by slice against masks, one value after the other; what values are called; columns that features give."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.id_names import names_of_ids
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.metrics.exact import evaluate_predictions
from tessera.ctr.report.report import write_report
from tessera.ctr.report.slices import TOP, largest_ids, measure_slices
from tessera.ctr.runs.slice_columns import SliceColumn
from tessera.embedding.errors import ConfigError
from tessera.kernels.string_hash import xxh64
from tests.ctr.report.html_page import check_page
from tests.ctr.report.run_folder import columns

ROWS = 1200
RANDOM = np.random.default_rng(0)
COUNTRY = RANDOM.choice([5, -7, 11, 2**62], ROWS, p=[0.5, 0.3, 0.15, 0.05])
NULL = RANDOM.random(ROWS) < 0.1
AGE = np.round(RANDOM.gamma(2, 12, ROWS)).astype(np.float32)
BAGS = [RANDOM.choice(6, RANDOM.integers(0, 5)).tolist() for _ in range(ROWS)]  # also twice the same, also none
MANY = RANDOM.integers(0, 60, ROWS)


def write(folder, name: str, values: pa.Array, metadata: dict | None = None, files: int = 2, **changed):
    """Predictions of ROWS rows with one more column, over some files."""
    rows = {key: pa.array(column) for key, column in (columns(1, ROWS) | changed).items()}
    fields = [pa.field(key, column.type) for key, column in rows.items()]
    schema = pa.schema([*fields, pa.field(name, values.type, metadata=metadata)])
    table = pa.table([*rows.values(), values], schema=schema)
    (folder / "predictions").mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(ROWS), files)):
        pq.write_table(table.take(pa.array(part)), folder / "predictions" / f"test-{number}.parquet")
    return folder / "predictions"


def of(mask, **changed):
    return evaluate_predictions(**{name: column[mask] for name, column in (columns(1, ROWS) | changed).items()})


def test_ids_most_rows_first_and_missing_ones(tmp_path):
    folder = write(tmp_path, "slice.country", pa.array(COUNTRY, mask=NULL), {"dtype": "int"})
    slices = measure_slices(folder, "test", "slice.country")
    masks = {str(value): (value == COUNTRY) & ~NULL for value in (5, -7, 11, 2**62)} | {"missing": NULL}
    expected = {name: of(mask) for name, mask in sorted(masks.items(), key=lambda item: -item[1].sum())}
    assert [name for name, _ in slices.parts] == list(expected)
    assert dict(slices.parts) == expected
    assert slices.distinct == 5 and slices.feature == "country" and slices.rows == ROWS


def test_a_row_counts_once_for_each_value_of_its_bag(tmp_path):
    folder = write(tmp_path, "slice.tags", pa.array(BAGS, pa.list_(pa.int64())))
    slices = dict(measure_slices(folder, "test", "slice.tags").parts)
    for value in range(6):
        assert slices[str(value)] == of(np.array([value in bag for bag in BAGS])), value
    assert slices["missing"] == of(np.array([not bag for bag in BAGS])) and len(slices) == 7


def test_all_but_the_largest_slices_stand_together(tmp_path):
    folder = write(tmp_path, "slice.many", pa.array(MANY))
    slices = measure_slices(folder, "test", "slice.many")
    counts = np.bincount(MANY)
    largest = np.argsort(-counts, kind="stable")[:TOP]
    assert [name for name, _ in slices.parts] == [*map(str, largest), f"{60 - TOP} other values"]
    assert slices.parts[-1][1] == of(~np.isin(MANY, largest))
    assert sum(one["rows"] for _, one in slices.parts) == ROWS and slices.distinct == 60
    assert set(largest) <= set(largest_ids(folder, "test", "slice.many").tolist())


def test_a_number_in_buckets_of_about_equal_rows(tmp_path):
    folder = write(tmp_path, "slice.age", pa.array(AGE), {"transform": "log1p"})
    slices = measure_slices(folder, "test", "slice.age")
    names = [name for name, _ in slices.parts]
    edges = [float(name.split(" to ")[0]) for name in names[1:-1]] + [float(names[-1].split()[0])]
    assert names[0] == f"below {edges[0]:g}" and names[-1].endswith(" and above") and len(names) == 10
    for (_, one), low, high in zip(slices.parts, [-np.inf, *edges], [*edges, np.inf], strict=True):
        assert one == of((low <= AGE) & (high > AGE)) and 60 < one["rows"] < 190
    assert "after the transform log1p" in slices.caption


@pytest.mark.parametrize("values, names", [(np.full(ROWS, 2.5), ["2.5"]), (AGE > 60, ["below 1", "1 and above"])])
def test_a_number_of_few_values(tmp_path, values, names):
    folder = write(tmp_path, "slice.x", pa.array(values.astype(np.float32)))
    assert [name for name, _ in measure_slices(folder, "test", "slice.x").parts] == names


def test_boundaries_name_the_buckets_of_the_schema(tmp_path):
    bucket = pa.array(np.searchsorted([10.0, 30.5], AGE, side="right"))
    folder = write(tmp_path, "slice.age", bucket, {"boundaries": "[10.0, 30.5]"})
    slices = dict(measure_slices(folder, "test", "slice.age").parts)
    assert list(slices) == ["below 10", "10 to 30.5", "30.5 and above"]
    assert slices["10 to 30.5"] == of((AGE >= 10) & (AGE < 30.5))


def test_new_against_known_ids_and_rows_of_no_weight(tmp_path):
    new, weight = MANY < 7, RANDOM.integers(0, 3, ROWS).astype(np.float32)
    folder = write(tmp_path, "new_ids", pa.array(new), weight=weight)
    slices = measure_slices(folder, "test", "new_ids")
    assert slices.parts == [("all ids known", of(~new, weight=weight)), ("with new ids", of(new, weight=weight))]


@pytest.mark.parametrize("stored", [pa.uint64(), pa.list_(pa.uint64()), pa.large_list(pa.uint64())], ids=str)
def test_unsigned_ids_are_shown_as_they_are_stored(tmp_path, stored):
    """From 2^63 on the 64 bits that the reader keeps are those of a negative number."""
    bags = pa.types.is_list(stored) or pa.types.is_large_list(stored)
    table = {"label": [0, 1], "a": pa.array([[2**63], [2**64 - 1]] if bags else [2**63, 2**64 - 1], stored)}
    pq.write_table(pa.table(table), tmp_path / "part.parquet")
    schema = Schema.from_config({"features": [{"name": "a", "kind": "ids" if bags else "id"}]})
    reader = ParquetReader(str(tmp_path), schema, 2, lanes=1, shuffle=False)
    (batch,) = reader.epoch(0)
    column = SliceColumn(schema, "a", reader.groups.unsigned)
    values = column.values(batch).take(pa.array(MANY % 2))
    folder = write(tmp_path / "run", column.field.name, values, column.field.metadata)
    assert {name for name, _ in measure_slices(folder, "test", "slice.a").parts} == {str(2**63), str(2**64 - 1)}


def test_hex_ids_and_hashes_of_strings(tmp_path):
    ids = pa.array(np.where(MANY < 30, -1, 255))
    folder = write(tmp_path / "hex", "slice.h", ids, {"dtype": "hex"})
    assert {name for name, _ in measure_slices(folder, "test", "slice.h").parts} == {"f" * 16, "ff"}
    folder = write(tmp_path / "string", "slice.s", ids, {"dtype": "string"})
    names = {"ff": "<Andorra>"}
    assert {name for name, _ in measure_slices(folder, "test", "slice.s", names).parts} == {
        "<Andorra>",
        f"hash {'f' * 16}",
    }
    (tmp_path / "string" / "slice_names.json").write_text(json.dumps({"s": names}))
    write_report(tmp_path / "string")
    html = (tmp_path / "string" / "report.html").read_text()
    check_page(html)
    assert "&lt;Andorra&gt;" in html and "<h3>s</h3>" in html


def test_the_report_holds_what_the_page_shows(tmp_path):
    write(tmp_path, "slice.country", pa.array(COUNTRY, mask=NULL), {"dtype": "int"})
    values = write_report(tmp_path).values
    assert values == json.loads((tmp_path / "report.json").read_text())
    first = values["slices"]["country"]["slices"][0]
    assert first["value"] == "5" and first["auc"] == of((COUNTRY == 5) & ~NULL)["auc"]
    html = (tmp_path / "report.html").read_text()
    assert f'<th scope="row">5</th><td>{first["rows"]:,}</td>' in html and f"<td>{first['auc']:.4f}</td>" in html


def test_a_column_that_has_no_slices_is_named(tmp_path):
    folder = write(tmp_path, "slice.x", pa.array(["a"] * ROWS))
    with pytest.raises(DataError, match=r"column slice.x is string; expected integers"):
        measure_slices(folder, "test", "slice.x")


SCHEMA = {
    "labels": ["label"],
    "features": [
        {"name": "site", "dtype": "string"},
        {"name": "user"},
        {"name": "tags", "kind": "ids", "dtype": "string", "delimiter": "|"},
        {"name": "age", "kind": "numeric", "transform": "log1p", "indicator": True},
        {
            "name": "age_bucket",
            "kind": "numeric",
            "column": "age",
            "transform": "bucketise",
            "boundaries": [10.0, 30.5],
        },
    ],
}


@pytest.fixture
def data(tmp_path):
    sites = pa.array(RANDOM.choice(["news.example", "shop", "mail"], ROWS), mask=NULL)
    tags = ["|".join(f"t{tag}" for tag in bag) for bag in BAGS]
    table = {"label": MANY % 2, "site": sites, "user": MANY, "tags": tags, "age": AGE}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(table), tmp_path / "data" / "a.parquet", row_group_size=500)
    return tmp_path / "data", table


@pytest.mark.parametrize("ranks", [1, 3])
def test_columns_of_features_hold_each_rows_values(data, ranks):
    """Over ranks, and with the padding that a step of unequal ranks has: in the place that its number says."""
    path, table = data
    schema = Schema.from_config(SCHEMA)
    slices = [SliceColumn(schema, name) for name in ("site", "user", "tags", "age", "age_missing", "age_bucket")]
    found = {column.feature: {} for column in slices}
    for rank in range(ranks):
        for batch in ParquetReader(str(path), schema, 70, rank, ranks, shuffle=False, numbered=True).epoch(0):
            for column in slices:
                values = column.values(batch)
                assert values.type == column.field.type and len(values) == batch.rows
                found[column.feature] |= dict(zip(batch.number[: batch.rows].tolist(), values.to_pylist(), strict=True))
    found = {name: [values[row] for row in range(ROWS)] for name, values in found.items()}
    assert found["user"] == MANY.tolist()
    assert found["site"] == [None if site is None else hashed(site) for site in table["site"].to_pylist()]
    assert found["tags"] == [[hashed(f"t{tag}") for tag in bag] for bag in BAGS]
    np.testing.assert_allclose(found["age"], np.log1p(AGE), rtol=1e-6)
    assert found["age_missing"] == [0] * ROWS
    assert found["age_bucket"] == np.searchsorted([10.0, 30.5], AGE, side="right").tolist()
    assert json.loads(slices[5].field.metadata[b"boundaries"]) == [10.0, 30.5]


def hashed(text: str) -> int:
    data = np.frombuffer(text.encode(), np.uint8).copy()
    return int(xxh64(torch.from_numpy(data), torch.tensor([0, len(data)])))


def test_names_behind_hashes_are_found_in_the_data(data):
    path, _ = data
    schema = Schema.from_config(SCHEMA)
    groups = ParquetReader(str(path), schema, 70).groups
    features = {one.name: one for one in schema.categorical}
    wanted = np.array([hashed("shop"), hashed("no such site"), hashed("mail")])
    assert names_of_ids(groups, features["site"], wanted) == {hashed("shop"): "shop", hashed("mail"): "mail"}
    tags = {hashed(f"t{tag}"): f"t{tag}" for tag in range(6)}
    assert names_of_ids(groups, features["tags"], np.array(list(tags))) == tags


def test_an_unknown_feature_is_refused():
    with pytest.raises(ConfigError, match="slice 'sitee' is no feature of the schema; did you mean 'site'?"):
        SliceColumn(Schema.from_config(SCHEMA), "sitee")
