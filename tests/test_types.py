"""Types of all packages hold by mypy, as `make lint` checks them: strictly but for ctr and scripts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_mypy_finds_no_errors():
    environment = {**os.environ, "TESSERA_VENV": str(Path(sys.prefix))}
    script = ROOT / "scripts" / "typecheck.sh"
    done = subprocess.run([str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
