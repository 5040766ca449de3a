"""The published splits: descriptions convert files of that shape, experiments fit them, sums are checked."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from tessera.ctr.config import load_config
from tessera.ctr.data.convert.csv import convert_csv
from tessera.ctr.data.convert.pipeline import Options
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.data.transforms import bucket
from tessera.ctr.network import build_tower

ROOT = Path(__file__).resolve().parents[4]
PUBLISHED = sorted(path.stem for path in (ROOT / "conf/prepare").glob("*.yaml"))


def copy(tmp_path: Path, name: str) -> Path:
    """The description beside three small files of its columns, with their sums."""
    description = OmegaConf.load(ROOT / f"conf/prepare/{name}.yaml")
    columns = {column.get("source", column.name): column for column in description.columns}  # of the text
    values = {"label": "1", "hour": "14102100", "weekday": "14102100"}
    numbers = {"float32": "0.25"}
    line = ",".join(values.get(column.name, numbers.get(column.type, "77")) for column in columns.values())
    text = ",".join(columns) + "\n" + f"{line}\n" * 4
    sums = {}
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.csv").write_text(text)
        sums[f"{split}.csv"] = hashlib.md5(text.encode()).hexdigest()
    description.input.md5 = sums
    OmegaConf.save(description, tmp_path / f"{name}.yaml")
    return tmp_path / f"{name}.yaml"


#: Criteo's other split has the same columns and fewer experiments.
SLOW = "criteo_x4"


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow) if one == SLOW else one for one in PUBLISHED]
)
def test_a_published_split_converts_and_its_experiments_fit_it(tmp_path, name):
    summary = convert_csv(copy(tmp_path, name), tmp_path / "out", Options())
    assert summary["rows"] == {"train": 4, "valid": 4, "test": 4}
    experiments = sorted(path.stem for path in (ROOT / "conf/experiment").glob(f"{name}_*.yaml"))
    assert len(experiments) >= 4
    for experiment in experiments:
        config = load_config([f"experiment={experiment}"], "")
        assert config.data.name == name
        schema = Schema(config.data.schema)
        build_tower(config, schema)
        reader = ParquetReader(str(tmp_path / "out" / "train"), schema, batch_size=4)
        assert next(iter(reader.epoch(0))).rows == 4


def test_another_file_of_that_name_is_refused(tmp_path):
    path = copy(tmp_path, "frappe_x1")
    (tmp_path / "valid.csv").write_text((tmp_path / "valid.csv").read_text().replace("77", "78"))
    with pytest.raises(DataError, match=r"valid.csv: md5 \w{32}, expected \w{32}; this is not the published file"):
        convert_csv(path, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["criteo_x1", "avazu_x1", "criteo_x4", "avazu_x4"])
def test_known_sums_are_in_the_description(name):
    assert set(OmegaConf.load(ROOT / f"conf/prepare/{name}.yaml").input.md5) == {"train.csv", "valid.csv", "test.csv"}


def test_hour_and_weekday_are_those_of_the_time(tmp_path):
    convert_csv(copy(tmp_path, "avazu_x4"), tmp_path / "out", Options())
    table = pq.read_table(tmp_path / "out" / "train")
    assert table["hour"].to_pylist() == [0] * 4
    assert table["weekday"].to_pylist() == [1] * 4  # 21 October 2014 was a Tuesday


def test_counts_of_criteo_x4_fall_into_the_published_buckets():
    """floor(ln(x) squared) above 2, the number itself up to it; ours keeps 3 to 5 apart from 1 and 2."""
    features = Schema(load_config(["experiment=criteo_x4_deepfm"], "").data.schema).categorical[:13]
    counts = np.unique(np.concatenate([np.arange(6, 3000), np.geomspace(3000, 2.5e7, 20000).astype(np.int64)]))
    published = np.floor(np.log(counts) ** 2).astype(np.int64)
    for feature in features:
        ours = bucket(feature, counts.astype(np.float64))
        assert (np.diff(ours) == np.diff(published)).all()
        assert bucket(feature, np.array([-2.0, -1, 0, 1, 2, 3, 4, 5])).tolist() == [1, 2, 3, 4, 5, 6, 6, 7]
        assert feature.missing_id == 3
