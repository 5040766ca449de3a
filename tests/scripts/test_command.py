"""The command `tessera`: every word has its script, help lists what there is, mistakes are one line."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest

from tessera import ctr
from tessera.ctr.config import Config
from tessera.ctr.config_help import choices, keys_by_group
from tessera.ctr.overrides import keys_of
from tessera.scripts.command import COMMANDS, main
from tests.ranks import PYTHONPATH, ROOT


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {word} +\S", shown, re.M) for word in COMMANDS)


def test_every_script_of_the_folder_is_a_command():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__", "command"}
    assert scripts == {module for module, _ in COMMANDS.values()}


@pytest.mark.parametrize("word", COMMANDS)
def test_each_shows_its_own_help(word, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tessera"])
    with pytest.raises(SystemExit) as left:
        main([word, "--help"])
    shown = capsys.readouterr().out
    assert not left.value.code and shown.startswith(f"usage: tessera {word}")


def test_training_lists_models_data_sets_and_every_key(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tessera"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for group in ("model", "data", "experiment") for name in choices()[group])
    assert max(map(len, shown.splitlines())) <= 120
    words = {word.partition("=")[0] for word in shown.split()}  # `name=default`, `group:`
    for key, _ in keys_of(Config):
        if "." in key:
            assert key.rpartition(".")[2] in words | {"first", "last"} or f"{key}:" in words, key
    assert "from" in keys_by_group(Config)["daily"]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tessera {metadata.version('tessera-ctr')}\n"
    assert ctr.__version__ == metadata.version("tessera-ctr")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "error: tessera has no command 'trian'; did you mean train?\n"),
        (["xyz"], f"error: tessera has no command 'xyz'; expected one of {', '.join(COMMANDS)}\n"),
        (["apply_delta"], "error: tessera has no command 'apply_delta'; did you mean apply-delta?\n"),
    ],
)
def test_an_unknown_word_is_one_line(words, line, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == line


def test_what_a_script_returns_is_the_status(capsys):
    assert main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere: no such folder")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        pytest.param("tessera tr", {"train"}, marks=pytest.mark.slow),
        ("tessera evaluate --sp", {"--split"}),
        ("tessera train model=deep", {"model=deepfm", "model=deepfm_p"}),
        pytest.param("tessera train trainer.epo", {"trainer.epochs="}, marks=pytest.mark.slow),
    ],
)
def test_a_shell_completes(typed, offered, tmp_path):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    environment |= {"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "COMP_TYPE": "9"}
    environment |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered")}
    command = [sys.executable, "-m", "tessera.scripts.command"]
    subprocess.run(command, env=environment, timeout=60, check=True, cwd=tmp_path)
    found = {word.strip() for word in (tmp_path / "offered").read_text().split("\n") if word.strip()}
    assert found == offered


def test_it_works_away_from_the_checkout(tmp_path):
    """There `conf`, `ctr` and the other folders are no modules by themselves."""
    places = [place for place in PYTHONPATH.split(os.pathsep) if place != str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    make = [
        sys.executable,
        "-m",
        "tessera.scripts.command",
        "prepare",
        "synthetic",
        "--rows",
        "200",
        "--output",
        "data",
    ]
    done = subprocess.run(make, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "schema.yaml").exists()
