"""Types of all packages hold by mypy, as `make lint` checks them: in full, and strictly but for ctr and scripts."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
IGNORED = 2  # where a benchmark puts methods of its own into a kernel


def test_mypy_finds_no_errors():
    environment = {**os.environ, "TESSERA_VENV": str(Path(sys.prefix))}
    script = ROOT / "scripts" / "typecheck.sh"
    done = subprocess.run([str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_kind_of_error_is_off():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"^(?:disable_error_code|ignore_errors|check_untyped_defs = false).*", text, re.MULTILINE) == []


def test_every_function_of_every_package_says_its_types():
    text = (ROOT / "pyproject.toml").read_text()
    told = re.findall(r"^module = (\[.*\]).*\n(?:\w+ = true\n)*disallow_untyped_defs = true$", text, re.MULTILINE)
    packages = {mark.parent.name for mark in ROOT.glob("*/py.typed")}
    assert {name for line in told for name in re.findall(r'"tessera\.(\w+)\.\*"', line)} >= packages - {"conf"}


def test_few_lines_are_ignored_and_each_says_which_kind_of_error():
    sources = [path for mark in ROOT.glob("*/py.typed") for path in mark.parent.rglob("*.py")]
    found = [line for path in sources for line in path.read_text().splitlines() if "# type: ignore" in line]
    assert len(found) <= IGNORED
    assert [line for line in found if "# type: ignore[" not in line] == []
