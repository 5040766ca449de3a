"""Run a function on several gloo ranks of this machine, as the tests of everything distributed do."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

import torch
import torch.multiprocessing as mp

from tessera.distributed import process as process_module

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # other processes import what this one does


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(process, *arguments)` on `world` ranks; their results in rank order. It must be importable."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with _context().Pool(world) as pool:
        jobs = [pool.apply_async(_rank, (rank, world, environment, function, arguments)) for rank in range(world)]
        return [job.get(timeout=300) for job in jobs]


@cache
def _context() -> mp.context.BaseContext:
    """Ranks are forked from one process that has imported all: torchrec's import takes longer than most tests."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "hypothesis", "tests.warm"])
    saved = dict(os.environ)
    os.environ |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= saved
    return context


def _rank(rank: int, world: int, environment: dict[str, str], function: Callable[..., Any], arguments: tuple) -> Any:
    os.environ.clear()  # what the fork server has is that of its start
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
    )
    torch.set_num_threads(1)
    draw_nothing()
    process = process_module.start("cpu", timeout_seconds=60)
    result = function(process, *arguments)
    process_module.stop(process)
    return result


def draw_nothing() -> None:
    """Leave the drawing of a report's plots out: it takes as long as all else of a small job."""
    from matplotlib.figure import Figure

    def savefig(_figure: Figure, stream: IO[str], **_options: Any) -> None:
        stream.write('<svg viewBox="0 0 1 1"></svg>')

    Figure.savefig = savefig


def run_script(script: str, *arguments: str, world: int = 1, timeout: float = 120) -> subprocess.CompletedProcess:
    """`python script arguments...` from the repository's root, in processes that have imported all.

    world: how many ranks, as torchrun would start them, but for its own words. The status is the first that is not 0.
    What trains draws nothing (tests/ctr/train/test_training.py has a run that does); what reports draws.
    """
    command, environments = [script, *arguments], [dict(os.environ)]
    if world > 1:
        numbers = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        environments = [{**os.environ, **numbers, **meeting, **rank} for rank in ranks]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        children = [_context().Process(target=_script, args=(command, one, out, err)) for one in environments]
        for child in children:
            child.start()
        end = time.monotonic() + timeout
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
        late = [child for child in children if child.exitcode is None]
        for child in late:
            child.kill()
        said = [path.read_text() if path.exists() else "" for path in (out, err)]
        if late:
            raise subprocess.TimeoutExpired(command, timeout, *said)
        status = next((child.exitcode for child in children if child.exitcode), 0)
        return subprocess.CompletedProcess(command, status, *said)


def _script(command: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    if command[0] == "scripts/train.py":
        draw_nothing()
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def torchrun(world: int, *command: str, timeout: float = 180, **environment: str) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node world command...` from the repository's root."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.run(
        launcher + list(command),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
