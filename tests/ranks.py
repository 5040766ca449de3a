"""Run a function on several gloo ranks of this machine, as the tests of everything distributed do."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.multiprocessing as mp

from tessera.distributed import process as process_module

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # other processes import what this one does


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(process, *arguments)` on `world` ranks; their results in rank order. It must be importable."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
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


def on_hosts_of(process: Any, each: int) -> None:
    """Have this rank be on a host of `each` ranks, as a launcher would say."""
    os.environ.update(LOCAL_WORLD_SIZE=str(each), LOCAL_RANK=str(process.rank % each))


class _Undrawn:
    """Stands for axes: takes every call and has every attribute."""

    def __getattr__(self, name: str) -> _Undrawn:
        if name.startswith("__"):
            raise AttributeError(name)  # numpy asks whether this is an array
        return self

    def __call__(self, *_arguments: Any, **_options: Any) -> _Undrawn:
        return self

    def get_legend_handles_labels(self) -> tuple[list, list]:
        return [], []

    def __iter__(self) -> Iterator[_Undrawn]:
        return iter(())

    def __le__(self, _other: object) -> bool:
        return True


def draw_nothing() -> None:
    """Leave the drawing of a report's plots out: it takes as long as all else of a small job."""
    import matplotlib
    from matplotlib.figure import Figure

    def savefig(_figure: Figure, stream: IO[str], **_options: Any) -> None:
        stream.write('<svg viewBox="0 0 1 1"></svg>')

    def subplots(_figure: Figure, rows: int, *_arguments: Any, **_options: Any) -> np.ndarray:
        axes = np.empty((rows, 1), object)
        axes[:, 0] = [_Undrawn() for _ in range(rows)]
        return axes

    Figure.savefig, Figure.subplots = savefig, subplots
    matplotlib.rc_context = lambda *_arguments: contextlib.nullcontext()  # else all settings are copied for each plot


def run_script(
    script: str, *arguments: str, world: int = 1, timeout: float = 120, place: Path = ROOT
) -> subprocess.CompletedProcess:
    """`python script arguments...` in processes that have imported all.

    script: a file, or `-c` with code as the first argument. place: where it runs; the repository's root by default.
    world: how many ranks, as torchrun would start them, but for its own words. The status is the first that is not 0.
    What trains draws nothing (tests/ctr/train/test_training.py has a run that does); what reports draws.
    """
    command, environments = [script, *arguments], [dict(os.environ)]
    if world > 1:
        numbers = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        environments = [{**os.environ, **numbers, **meeting, **rank} for rank in ranks]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        children = [_context().Process(target=_script, args=(command, one, out, err, place)) for one in environments]
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


def _script(command: list[str], environment: dict[str, str], out: Path, err: Path, place: Path) -> None:
    _settle(environment, out, err)
    os.chdir(place)
    if command[0] == "scripts/train.py":
        draw_nothing()
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def _settle(environment: dict[str, str], out: Path, err: Path) -> None:
    """What a new process has by itself: an environment, the repository's root, and where it writes."""
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())


def torchrun(world: int, *command: str, timeout: float = 180, **environment: str) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node world command...` from the repository's root."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *_launcher_arguments(world)]
    return subprocess.run(
        launcher + list(command),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def warm_torchrun(world: int, *command: str, timeout: float = 60) -> subprocess.CompletedProcess:
    """As `torchrun`, but launcher and ranks are forked from what has imported all: seconds less for each of them."""
    with tempfile.TemporaryDirectory() as folder, futures.ThreadPoolExecutor(2) as threads:
        out, err = Path(folder) / "out", Path(folder) / "err"
        for path in (out, err):
            os.mkfifo(path)  # which ends when nobody writes any more: what is left behind speaks last
        said = [threads.submit(path.read_text) for path in (out, err)]
        launcher = start_warm_torchrun(world, *command, out=out, err=err)
        try:
            texts = [one.result(timeout) for one in said]
        except futures.TimeoutError:
            launcher.kill()
            raise
        launcher.join()
        return subprocess.CompletedProcess(command, launcher.exitcode, *texts)


def start_warm_torchrun(world: int, *command: str, out: Path, err: Path) -> mp.process.BaseProcess:
    """Torch's launcher with its ranks as children. What all of them say goes to the two files."""
    arguments = [*_launcher_arguments(world), *command]
    launcher = _context().Process(target=_launch, args=(arguments, dict(os.environ), out, err))
    launcher.start()
    return launcher


def _launcher_arguments(world: int) -> list[str]:
    return ["--standalone", "--nproc-per-node", str(world)]


def _launch(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.run import main

    _settle(environment, out, err)
    SubprocessHandler._popen = lambda _handler, command, given: _ForkedRank(command, given)
    main(arguments)


class _ForkedRank:
    """What torch's launcher asks of a rank, as `subprocess.Popen` has it. The launcher is its parent."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str]) -> None:
        script = list(command[command.index("-u") + 1 :])
        self._process = mp.get_context("fork").Process(target=_as_rank, args=(script, environment))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return self.poll()


def _as_rank(script: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    os.closerange(3, 1024)  # the launcher's sockets
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
