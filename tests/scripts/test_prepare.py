"""The command, run as users run it."""

import fcntl
import gzip
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from tessera.scripts.prepare import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare.py"
LINE = "1" + "\t5" * 13 + "\t68fd1e64" * 26 + "\n"


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Runs the command in tmp_path, inside this process, as importing takes seconds."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        status = main()
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=shown.out, stderr=shown.err)

    return run


def test_synthetic(tmp_path, prepare):
    done = prepare("synthetic", "--rows", 5000, "--valid", 0.2, "--output", "data/s", "--row-group-rows", 700)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads((tmp_path / "data" / "s" / "teacher.json").read_text())
    assert f"no model can do better than AUC {said['splits']['test']['auc']:.4f}" in done.stdout
    assert said["parameters"]["valid"] == 0.2
    metadata = pq.read_metadata(tmp_path / "data" / "s" / "train" / "part-00000.parquet")
    assert (metadata.num_rows, metadata.row_group(0).num_rows) == (3500, 700)
    again = prepare("synthetic", "--rows", 5000, "--output", "data/s")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1 and "--overwrite" in again.stderr
    days = prepare("synthetic", "--rows", 3000, "--days", 3, "--start-date", "2024-02-28", "--threads", 2,
                   "--output", "data/s", "--overwrite")  # fmt: skip
    assert days.returncode == 0
    folders = sorted(path.name for path in (tmp_path / "data" / "s").iterdir() if path.is_dir())
    assert folders == ["day=2024-02-28", "day=2024-02-29", "day=2024-03-01"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["s"]


def test_criteo(tmp_path, prepare):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((LINE * 50 + "1\t2\n" + LINE * 50).encode()))
    arguments = ["criteo", "--train", "a.txt.gz", "--test", "a.txt.gz", "--output", "out"]
    bad = prepare(*arguments)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == "error: a.txt.gz line 51: expected 40 columns separated by '\\t', found 2: '1\\t2'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt.gz"]
    done = prepare(*arguments, "--bad-rows", "skip")
    assert (done.returncode, done.stderr) == (0, "")  # and no progress bar, as nobody looks
    assert done.stdout == "criteo: rows written: train 100, test 100\nskipped 2 bad rows of a.txt.gz\n"


def test_mistakes_in_the_command(tmp_path, prepare):
    (tmp_path / "a.txt").write_text(LINE)
    for arguments, message in [
        (("criteo", "--input", "a.txt"), "--output: found none, expected the folder to make"),
        (("criteo", "--output", "out"), "--input and --train: found neither, expected one of them"),
        (("avazu", "--input", "a.txt", "--train", "a.txt", "--output", "out"), "found both, expected one"),
        (("avazu", "--input", "b.csv", "--output", "out"), "b.csv: found nothing, expected a file"),
        (("criteo", "--input", "a.txt", "--valid-from", "soon", "--output", "out"), "valid-from: found 'soon'"),
        (("csv", "--config", "c.yaml"), "c.yaml: cannot be read"),
    ]:
        done = prepare(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_bar_only_when_someone_looks(tmp_path):
    """As users run it, with a pseudo-terminal as stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # 24 lines of 100 characters
    command = [sys.executable, str(SCRIPT), "synthetic", "--rows", "2000", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs, timeout=120)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0 and "synthetic: 100%" in shown
