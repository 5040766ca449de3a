"""The README's way from a run to an answer of a server, command by command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tests.docs.pages import ROOT, blocks
from tests.ranks import PYTHONPATH, run_script

pytest.importorskip("uvicorn", reason="the extra serve is not installed")


def commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    (block,) = (one for one in blocks(text, "sh") if "curl" in one)
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.slow
def test_a_run_an_export_and_an_answer(tmp_path):
    make, export, serve, curl = commands()
    assert make == ["make", "demo", "ARGS=trainer.run_dir=runs/demo"]
    assert export[:-1] == ["tessera", "export", "runs/demo", "--output"] and export[-1] == serve[2] == "exports/demo"
    assert serve[:2] == ["tessera", "serve"] and curl[0] == "curl"
    write_synthetic(SyntheticConfig(rows=2000), tmp_path / "data")
    run_dir, folder = tmp_path / "run", tmp_path / "export"
    few = [f"data.path={tmp_path}/data", f"trainer.run_dir={run_dir}", "trainer.device=cpu"]
    done = run_script("scripts/train.py", "experiment=demo", *few)
    assert done.returncode == 0, done.stderr
    done = run_script("scripts/export.py", str(run_dir), "--output", str(folder))
    assert done.returncode == 0 and "golden rows lie within" in done.stdout, done.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(folder), "--port", str(port)]
    server = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": PYTHONPATH}, stderr=subprocess.PIPE, text=True)
    try:
        wait_until_ready(port)
        answer = json.loads(ask(curl, port, folder))
        assert 0 < answer["scores"][0] < 1 and answer["version"].startswith("best-step-")
    finally:
        server.terminate()
        assert server.wait(timeout=30) in (0, -15)


def wait_until_ready(port: int) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not begin")


def ask(curl: list[str], port: int, folder: Path) -> str:
    words = [word.replace("localhost:8000", f"127.0.0.1:{port}").replace("exports/demo", str(folder)) for word in curl]
    if shutil.which("curl"):
        return subprocess.run([*words, "-s"], capture_output=True, text=True, timeout=60, check=True).stdout
    url = next(word for word in words if word.startswith("127.0.0.1"))
    body = words[words.index("-d") + 1]
    content = Path(body.removeprefix("@")).read_bytes()
    request = urllib.request.Request(f"http://{url}", content, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()
