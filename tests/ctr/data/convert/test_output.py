import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.data.convert import output
from tessera.ctr.data.convert.output import PartsWriter, Writing, complete_folder, write_description
from tessera.ctr.data.errors import DataError
from tessera.embedding.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]


def test_parts_do_not_depend_on_how_the_rows_come(tmp_path):
    table = pa.table({"n": np.arange(1000), "s": [str(i) for i in range(1000)]})
    for name, cut in (("one", 1000), ("small", 7), ("odd", 130)):
        (tmp_path / name).mkdir()
        writer = PartsWriter(tmp_path / name, Writing(row_group_rows=64, rows_per_file=300))
        for first in range(0, 1000, cut):
            writer.append("train", table.slice(first, cut))
        writer.close()
        files = sorted((tmp_path / name / "train").iterdir())
        assert [file.name for file in files] == [f"part-0000{i}.parquet" for i in range(4)]
        assert pa.concat_tables([pq.read_table(file) for file in files]) == table
        metadata = pq.read_metadata(files[0])
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert groups == [64, 64, 64, 64, 44]
        assert writer.rows == {"train": 1000}


def test_folders_beyond_the_limit_are_closed_and_crumbs_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "OPEN_FILES", 3)
    monkeypatch.setattr(output, "REOPENED", 4)
    table = pa.table({"n": np.arange(10)})
    writer = PartsWriter(tmp_path, Writing())
    for day in range(8):  # in order of time: any number of days
        writer.append(f"day={day}", table)
    assert len(writer._open) == 3
    with pytest.raises(DataError, match="expected input ordered by time"):
        for turn in range(20):
            writer.append(f"day={turn % 8}", table)


def test_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "new" / "data"
    with complete_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["data"]
    with pytest.raises(RuntimeError), complete_folder(tmp_path / "crashed") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_what_is_there_is_replaced_only_when_asked_and_ours(tmp_path):
    target = tmp_path / "data"
    (target).mkdir()
    with complete_folder(target) as folder:  # an empty folder is no obstacle
        write_description(folder, {"labels": ["label"]}, {"kind": "a"})
    with pytest.raises(ConfigError, match="it is not empty .--overwrite replaces"), complete_folder(target):
        pass
    with complete_folder(target, overwrite=True) as folder:
        write_description(folder, {}, {"kind": "b"})
        assert '"a"' in (target / "prepare.json").read_text()
    assert '"b"' in (target / "prepare.json").read_text()
    with pytest.raises(RuntimeError), complete_folder(target, overwrite=True):
        raise RuntimeError
    assert '"b"' in (target / "prepare.json").read_text()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").write_text("")
    with (
        pytest.raises(ConfigError, match="it holds thesis and no record that prepare.py wrote it"),
        complete_folder(tmp_path / "precious", overwrite=True),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "precious"]
    with pytest.raises(ConfigError, match="it is not a folder"), complete_folder(tmp_path / "precious" / "thesis"):
        pass


def test_killed_run_leaves_nothing_at_the_target(tmp_path):
    """SIGKILL in the middle of writing: the target does not exist, and the next run works."""
    code = f"""
import sys, time
from pathlib import Path
import pyarrow as pa
from tessera.ctr.data.convert.output import PartsWriter, Writing, complete_folder
with complete_folder(Path({str(tmp_path / "data")!r})) as folder:
    writer = PartsWriter(folder, Writing(row_group_rows=10))
    writer.append("train", pa.table({{"n": list(range(100))}}))
    print("half", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert not (tmp_path / "data").exists()
    with complete_folder(tmp_path / "data") as folder:
        (folder / "x").write_text("")
    assert (tmp_path / "data" / "x").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # what the killed one left is gone


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="row_group_rows: found 0, expected at least 1"):
        Writing(row_group_rows=0)
    with pytest.raises(ConfigError, match="compression: found 'rar'"):
        Writing(compression="rar")
