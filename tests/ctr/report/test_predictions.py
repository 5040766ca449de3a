"""Reading predictions: splits, files, and one clear line for whatever is wrong."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.report.predictions import read_predictions
from tests.ctr.report.run_folder import columns, write_predictions


def test_files_and_splits_are_joined(tmp_path):
    first, second, other = columns(0, 50), columns(1, 30), columns(2, 20)
    write_predictions(tmp_path, "a.parquet", first, "test")
    mixed = {name: np.concatenate([second[name], other[name]]) for name in second}
    mixed["split"] = ["test"] * 30 + ["valid"] * 20
    write_predictions(tmp_path, "b.parquet", mixed)
    splits = read_predictions(tmp_path)
    assert list(splits) == ["test", "valid"]
    np.testing.assert_array_equal(
        splits["test"].prediction, np.concatenate([first["prediction"], second["prediction"]])
    )
    np.testing.assert_array_equal(splits["test"].group, np.concatenate([first["group"], second["group"]]))
    np.testing.assert_array_equal(splits["valid"].positive, other["label"] == 1)
    assert splits["valid"].weight is None and splits["test"].prediction.dtype == np.float32


def test_weights_are_kept_where_only_some_files_differ_from_one(tmp_path):
    plain, weighted = columns(0, 5), columns(1, 5)
    weighted["weight"][:] = [2, 0, 0.5, 1, 1]
    write_predictions(tmp_path, "a.parquet", plain)
    write_predictions(tmp_path, "b.parquet", weighted)
    np.testing.assert_array_equal(read_predictions(tmp_path)["test"].weight, [1, 1, 1, 1, 1, 2, 0.5, 1, 1])


def test_a_flipped_bit_is_named_where_pages_have_checksums(tmp_path):
    values = {name: pa.array(one) for name, one in columns(0, 50).items()}
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(pa.table(values), tmp_path / "a.parquet", **options)
    chunk = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 1
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match="a.parquet: cannot be read as parquet"):
        read_predictions(tmp_path)


def test_a_file_without_rows_and_other_files_are_passed_over(tmp_path):
    write_predictions(tmp_path, "a.parquet", columns(0, 5))
    write_predictions(tmp_path, "b.parquet", columns(0, 0))
    (tmp_path / "c.partial").write_bytes(b"half written")
    assert len(read_predictions(tmp_path)["test"].prediction) == 5


def _without(name):
    return {key: value for key, value in columns(0, 5).items() if key != name}


def _with(**changed):
    return {**columns(0, 5), **changed}


NOT_A_NUMBER = np.float32([0.5, np.nan, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    "values, message",
    [
        (_without("label"), "no column label; found prediction, weight, group"),
        (_without("weight"), "no column weight"),
        (_with(prediction=NOT_A_NUMBER), "prediction: row 1 has nan (1 such rows)"),
        (
            _with(prediction=np.full(5, 1.5)),
            "column prediction has values from 1.5 to 1.5; expected probabilities",
        ),
        (_with(label=np.float32([0, 1, 7, 0, 0])), "label: row 2 has 7.0"),
        (_with(label=["a"] * 5), "column label is string; expected numbers"),
        (_with(group=np.zeros(5)), "column group is double; expected integers"),
        (_with(weight=pa.array([1.0, None, 1, 1, 1])), "column weight has 1 nulls"),
        (_with(weight=-np.ones(5)), "weight: row 0 has -1"),
    ],
)
def test_a_wrong_column_is_named_with_its_file(tmp_path, values, message):
    path = write_predictions(tmp_path, "part-7.parquet", values)
    with pytest.raises(DataError) as caught:
        read_predictions(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_missing_folder_no_files_no_rows(tmp_path):
    for folder, message in ((tmp_path / "absent", "no such folder"), (tmp_path, "no parquet file")):
        with pytest.raises(DataError, match=message) as caught:
            read_predictions(folder)
        assert str(folder) in str(caught.value)
    write_predictions(tmp_path, "a.parquet", columns(0, 0))
    with pytest.raises(DataError, match="1 parquet files without a row"):
        read_predictions(tmp_path)


def test_groups_in_some_files_only(tmp_path):
    write_predictions(tmp_path, "a.parquet", columns(0, 5))
    lacking = write_predictions(tmp_path, "b.parquet", _without("group"))
    with pytest.raises(DataError, match="no column group, which") as caught:
        read_predictions(tmp_path)
    assert str(caught.value).startswith(str(lacking))


def test_a_file_that_is_not_parquet(tmp_path):
    write_predictions(tmp_path, "a.parquet", columns(0, 5))
    path = tmp_path / "b.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="cannot be read as parquet") as caught:
        read_predictions(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_page_that_is_corrupt(tmp_path):
    path = write_predictions(tmp_path, "a.parquet", columns(0, 5000))
    content = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content[offset : offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_predictions(tmp_path)
