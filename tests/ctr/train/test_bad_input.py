"""Each mistake ends a job with one line that names what is wrong, and leaves no run folder behind."""

import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.config import load_config
from tessera.ctr.runs.folder import nothing_trained
from tessera.embedding.errors import ConfigError
from tests.ranks import run_script, warm_torchrun

ROWS = 64
SCHEMA = "data.schema.features=[{name: x, kind: numeric}, {name: c}]"


def table(**columns) -> pa.Table:
    generator = np.random.default_rng(0)
    good = {
        "label": (np.arange(ROWS) % 2).astype(np.int8),
        "x": generator.normal(size=ROWS).astype(np.float32),
        "c": generator.integers(0, 9, ROWS),
    }
    return pa.table({name: value for name, value in {**good, **columns}.items() if value is not None})


def write(folder: Path, *tables: pa.Table, name: str = "train") -> Path:
    (folder / name).mkdir(parents=True)
    for number, one in enumerate(tables):
        pq.write_table(one, folder / name / f"part-{number}.parquet", row_group_size=16)
    return folder


def arguments(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    fixed = ["data=synthetic", SCHEMA, "data.schema.time=null", "data.valid=null", "data.test=null"]
    small = ["model.hidden=[4]", "model.embedding_dim=4", "embedding.rows=50", "trainer.batch_size=32"]
    return ["scripts/train.py", *fixed, *small, f"data.path={data}", f"trainer.run_dir={run_dir}", *overrides]


def train(data: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess:
    return run_script(*arguments(data, run_dir, *overrides))


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


def test_missing_column(tmp_path, run_dir):
    refused(train(write(tmp_path, table(c=None, cc=np.arange(ROWS))), run_dir), "part-0.parquet", "'c'", "'cc'")
    assert not run_dir.exists()


def test_wrong_type_in_the_third_file_of_five(tmp_path, run_dir):
    wrong = table(c=np.linspace(0, 1, ROWS))
    data = write(tmp_path, table(), table(), wrong, table(), table())
    refused(train(data, run_dir), "part-2.parquet", "'c'", "double")
    assert not run_dir.exists()


def test_empty_folder(tmp_path, run_dir):
    (tmp_path / "train").mkdir()
    refused(train(tmp_path, run_dir), str(tmp_path / "train"), "parquet")
    assert not run_dir.exists()


def test_label_7(tmp_path, run_dir):
    labels = np.zeros(ROWS, np.int8)
    labels[40] = 7
    refused(train(write(tmp_path, table(label=labels)), run_dir), "part-0.parquet", "label", "7")


def test_corrupt_page(tmp_path, run_dir):
    path = write(tmp_path, table(), table()) / "train" / "part-1.parquet"
    content = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(2).column(2).data_page_offset
    content[offset : offset + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    refused(train(tmp_path, run_dir), "part-1.parquet", "row group 2")


def test_unknown_feature_key_in_the_yaml(tmp_path, run_dir):
    features = "data.schema.features=[{name: x, kind: numerik}]"
    refused(train(write(tmp_path, table()), run_dir, features), "numerik", "numeric")
    unknown = "data.schema.features=[{name: x, kind: numeric}, {name: d}]"
    refused(train(tmp_path, run_dir, unknown), "'d'")
    assert not run_dir.exists()


def test_misspelt_override(tmp_path, run_dir):
    refused(train(write(tmp_path, table()), run_dir, "trainer.bach_size=3"), "did you mean 'trainer.batch_size'?")


def test_batch_size_0(tmp_path, run_dir):
    refused(train(write(tmp_path, table()), run_dir, "trainer.batch_size=0"), "trainer.batch_size is 0")


def test_a_used_run_folder_is_refused(tmp_path, run_dir):
    run_dir.mkdir()
    (run_dir / "report.json").write_text("{}")
    refused(train(write(tmp_path, table()), run_dir), str(run_dir), "not empty")
    assert (run_dir / "report.json").read_text() == "{}"


def test_a_loss_that_is_not_finite_names_the_module(tmp_path, run_dir):
    blow_up = ["optimizer.dense.name=sgd", "optimizer.dense.lr=1e30", "trainer.epochs=20"]
    done = train(write(tmp_path, table()), run_dir, *blow_up)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "the loss of step" in line or "the gradient of" in line
    assert "module '" in line or "the gradient of '" in line
    assert not (run_dir / "best").exists()


@pytest.mark.slow
def test_more_ranks_than_row_groups_works(tmp_path, run_dir):
    (tmp_path / "train").mkdir()
    pq.write_table(table(), tmp_path / "train" / "part-0.parquet")
    done = run_script(*arguments(tmp_path, run_dir, "data.valid=train", "data.test=train"), world=2)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "report.html").exists()


def test_under_torchrun_the_line_comes_once_and_last(tmp_path, run_dir):
    labels = np.zeros(ROWS, np.int8)
    labels[40] = 7
    done = warm_torchrun(2, *arguments(write(tmp_path, table(label=labels)), run_dir))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [done.stderr.strip().splitlines()[-1]]
    assert "part-0.parquet" in said[0] and "7" in said[0]


def test_skipping_bad_rows_counts_them(tmp_path, run_dir):
    labels = np.array([0, 1] * (ROWS // 2), np.int8)
    labels[[3, 40]] = 7
    data = write(tmp_path, table(label=labels))
    done = train(data, run_dir, "data.bad_rows=skip", "data.valid=train", "data.test=train")
    assert done.returncode == 0, done.stderr
    assert "train: left out 2 " in done.stdout


def bad_labels() -> pa.Table:
    return table(label=np.full(ROWS, 7, np.int8))


@pytest.mark.parametrize("mistake", ["label", "page", "resume"])
def test_a_run_in_which_nothing_was_trained_does_not_block_its_retry(tmp_path, run_dir, mistake):
    data = write(tmp_path, bad_labels() if mistake == "label" else table())
    file = data / "train" / "part-0.parquet"
    if mistake == "page":
        raw = bytearray(file.read_bytes())
        raw[100:900] = bytes(800)
        file.write_bytes(raw)
    broken = ["trainer.warm_start.path=/nowhere"] if mistake == "resume" else []
    for _ in range(2):  # a second failure is no other than the first
        refused(train(data, run_dir, *broken))
        assert (run_dir / ".lock").exists()
    pq.write_table(table(), file, row_group_size=16)
    done = train(data, run_dir)
    assert done.returncode == 0, done.stderr
    assert "label" not in (run_dir / "train.log").read_text()  # what the runs before said is gone
    assert len(list((run_dir / "tensorboard").iterdir())) == 1
    refused(train(data, run_dir), "not empty")  # now something was trained


@pytest.mark.parametrize(
    "other", ["notes.txt", "best/model", "tensorboard/notes.txt", "checkpoints/x", "metrics.jsonl"]
)
def test_a_folder_with_anything_else_stays_as_it_is(tmp_path, run_dir, other):
    data = write(tmp_path, bad_labels())
    refused(train(data, run_dir))
    (run_dir / other).parent.mkdir(exist_ok=True)
    (run_dir / other).write_text('{"kind": "train", "step": 5}\n')
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    refused(train(data, run_dir), "not empty")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_folder_that_no_run_began_is_not_ours(run_dir):
    run_dir.mkdir()
    for name in ("config.yaml", "plan.txt", "versions.json"):
        (run_dir / name).write_text("mine")
    assert not nothing_trained(run_dir)
    (run_dir / ".lock").write_text("")
    assert nothing_trained(run_dir)


@pytest.mark.parametrize(
    "override", ["trainer.early_stop.patience=2", "trainer.eval_every=10", "optimizer.plateau.factor=0.5"]
)
def test_what_an_evaluation_steers_needs_a_valid_split(override):
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]} is .*, but data.valid is null"):
        load_config(["data=synthetic", "data.path=/x", "data.valid=null", override], "")
    load_config(["data=synthetic", "data.path=/x", override], "")
