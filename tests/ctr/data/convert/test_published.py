"""The published splits: descriptions convert files of that shape, experiments fit them, sums are checked."""

import hashlib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ctr.config import load_config
from ctr.data.convert.csv import convert_csv
from ctr.data.convert.pipeline import Options
from ctr.data.errors import DataError
from ctr.data.reader import ParquetReader
from ctr.data.schema import Schema
from ctr.models.network import build_tower

ROOT = Path(__file__).resolve().parents[4]
PUBLISHED = sorted(path.stem for path in (ROOT / "conf/prepare").glob("*.yaml"))


def copy(tmp_path: Path, name: str) -> Path:
    """The description beside three small files of its columns, with their sums."""
    description = OmegaConf.load(ROOT / f"conf/prepare/{name}.yaml")
    columns = [column.name for column in description.columns]
    line = ",".join("1" if column == "label" else "0.25" if column.startswith("I") else "77" for column in columns)
    text = ",".join(columns) + "\n" + f"{line}\n" * 4
    sums = {}
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.csv").write_text(text)
        sums[f"{split}.csv"] = hashlib.md5(text.encode()).hexdigest()
    description.input.md5 = sums
    OmegaConf.save(description, tmp_path / f"{name}.yaml")
    return tmp_path / f"{name}.yaml"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_split_converts_and_its_experiments_fit_it(tmp_path, name):
    summary = convert_csv(copy(tmp_path, name), tmp_path / "out", Options())
    assert summary["rows"] == {"train": 4, "valid": 4, "test": 4}
    experiments = sorted(path.stem for path in (ROOT / "conf/experiment").glob(f"{name}_*.yaml"))
    assert len(experiments) >= 4
    for experiment in experiments:
        config = load_config([f"experiment={experiment}"], "")
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


@pytest.mark.parametrize("name", ["criteo_x1", "avazu_x1"])
def test_known_sums_are_in_the_description(name):
    assert set(OmegaConf.load(ROOT / f"conf/prepare/{name}.yaml").input.md5) == {"train.csv", "valid.csv", "test.csv"}
