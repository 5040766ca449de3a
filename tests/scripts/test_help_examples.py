"""Every example that a script's help gives is a line that the script takes."""

from __future__ import annotations

import ast
import re
import shlex

import pytest

from tessera.ctr.config import load_config
from tessera.scripts.command import COMMANDS
from tests.ranks import ROOT, run_script

EXAMPLE = re.compile(r"\btessera ([a-z-]+)( [^`\n]+)")


def examples() -> list[tuple[str, str]]:
    """(script, arguments) of the commands in the docstrings of all scripts."""
    found = []
    for path in sorted((ROOT / "scripts").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        found += [(COMMANDS[word][0], line.strip()) for word, line in EXAMPLE.findall(text.replace("\\\n", " "))]
    return [(name, line) for name, line in found if "[" not in line and "--help" not in line]


EXAMPLES = examples()


def test_the_scripts_that_take_arguments_have_an_example():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__", "command", "doctor"}
    assert {name for name, _ in EXAMPLES} == scripts


@pytest.mark.parametrize(("script", "line"), EXAMPLES, ids=[f"{name} {line}" for name, line in EXAMPLES])
def test_it_is_understood(tmp_path, script, line):
    arguments = shlex.split(line)
    if script in ("train", "daily"):  # they would make a folder
        assert load_config([one.replace("data=mine", "data=criteo") for one in arguments], "").data.path
        return
    done = run_script(str(ROOT / "scripts" / f"{script}.py"), *arguments, place=tmp_path)  # some make a folder first
    # The paths of the example are not there: the script says so in its own line, and has understood the rest.
    assert done.returncode == 2 and "usage:" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr


def test_options_may_stand_between_overrides(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text((ROOT / "conf/model/lr.yaml").read_text())
    config = load_config(["model=mine", "--config-dir", str(tmp_path), "data.path=/x", "trainer.seed=7"], "")
    assert (config.data.path, config.trainer.seed) == ("/x", 7)
