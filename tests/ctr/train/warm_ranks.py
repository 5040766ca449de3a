"""Start the ranks of a training job in a fraction of a second: they are forked from a process that has imported all.

It is a child of the fork server of `tests.ranks`, answers commands over a pipe, and alone can wait for the ranks.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

from tests.ranks import ROOT, _context, draw_nothing, free_port


@cache
def _server() -> Connection:
    """A pipe to one for all tests of this process. It ends with this process, which closes the pipe."""
    mine, its = _context().Pipe()
    _context().Process(target=_serve, args=(its,), daemon=True).start()
    its.close()
    return mine


class WarmRanks:
    """script: of scripts/, train or daily. Ranks have the environment that this process has when they start."""

    def __init__(self, script: str = "train") -> None:
        self._script, self._pids = script, []

    def start(
        self,
        world: int,
        arguments: list[str],
        output: Path,
        end: tuple | None = None,
        overlap: bool = False,
        hang: str | None = None,
        at: tuple | None = None,
        die: str | None = None,
        plots: bool = False,
        **constants: float,
    ) -> list[int]:
        """Fork the ranks of the script. Returns their pids.

        end: (step, signal, ranks): these ranks send themselves the signal behind the step. overlap: begin with the
        next batch while a step is trained, as on a GPU. hang: writing the file of this path never ends. at: (begin of
        a stage, signal or one of AT, ranks): this happens to these ranks when they come to the stage. die: a rank is
        killed before it ends the file of this path, which may lie behind a URI. plots: draw those of the report, which
        takes longer than all else. constants: of distributed/heartbeat.py.
        """
        port = free_port()
        command = {"script": self._script, "world": world, "arguments": arguments, "output": str(output), "port": port}
        command |= {"end": end, "overlap": overlap, "hang": hang, "at": at, "die": die, "plots": plots}
        self._pids = self._ask(**command, environment=dict(os.environ), constants=constants)
        return self._pids

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Exit statuses of the ranks started last, -9 for one that was killed; None for one that still runs."""
        return self._ask(wait=seconds, pids=self._pids)

    def run(self, *arguments, **options) -> list[int | None]:
        self.start(*arguments, **options)
        return self.wait()

    def close(self) -> None:
        """End what still runs."""
        if self._pids:
            for pid, status in zip(self._pids, self.wait(0), strict=True):
                if status is None:
                    os.kill(pid, signal.SIGKILL)
            self.wait()

    def _ask(self, **command) -> list:
        server = _server()
        server.send(command)
        return server.recv()


def _fork_rank(rank: int, command: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    out = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    world = str(command["world"])
    os.environ.clear()
    os.environ.update(command["environment"], OMP_NUM_THREADS="1")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    if command["world"] > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(command["port"]))
    sys.argv = [f"scripts/{command['script']}.py", *command["arguments"]]

    from tessera.distributed import heartbeat

    script = importlib.import_module(f"tessera.scripts.{command['script']}")

    for name, value in command["constants"].items():
        setattr(heartbeat, name, value)
    if not command["plots"]:
        draw_nothing()
    if command["end"]:
        _end_behind(*command["end"], rank)
    if command["overlap"]:
        _overlap()
    if command["at"]:
        _at(*command["at"], rank)
    if command["hang"]:
        _hang(command["hang"])
    if command["die"]:
        _die(command["die"])
    status = 1
    try:
        status = script.main()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _end_behind(step: int, number: int, ranks: list[int], rank: int) -> None:
    from tessera.ctr.train.engine import Engine

    train_step = Engine.train_step

    def step_then_end(engine, batch):
        result = train_step(engine, batch)
        if engine.step == step and rank in ranks:
            os.kill(os.getpid(), number)
        return result

    Engine.train_step = step_then_end


def _at(stage: str, what: int | str, ranks: list[int], rank: int) -> None:
    from tessera.distributed.rank import Process

    def come_to(process: Process, text: str) -> None:
        process.__dict__["stage"] = text
        if rank in ranks and text.startswith(stage):
            time.sleep(0.5)  # the others hear of the stage
            AT[what](process) if what in AT else os.kill(os.getpid(), what)

    Process.stage = property(lambda process: process.__dict__["stage"], come_to)


def _no_memory(_process) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 18), -1))


def _no_files(_process) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), most))


def _no_threads(_process) -> None:
    def start(_thread) -> None:  # as Python does where the system gives no thread; root has no limit to reach
        raise RuntimeError("can't start new thread")

    threading.Thread.start = start


def _fill_disk(process) -> None:
    with suppress(OSError), open(Path(process.folder) / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def _folder_vanishes(process) -> None:
    os.rename(process.folder, f"{process.folder}-moved")


def _interrupt_twice(_process) -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.7)


#: What can happen to a rank at a stage.
AT = {
    "Ctrl-C twice": _interrupt_twice,
    "hang": lambda _process: time.sleep(600),
    "no memory": _no_memory,
    "no files": _no_files,
    "no threads": _no_threads,
    "disk full": _fill_disk,
    "folder vanishes": _folder_vanishes,
}


def _overlap() -> None:
    from tessera.ctr.train.step_pipeline import StepPipeline

    init = StepPipeline.__init__

    def init_with_overlap(pipeline, *arguments):
        init(pipeline, *arguments)
        pipeline.overlaps = True

    StepPipeline.__init__ = init_with_overlap


def _hang(path: str) -> None:
    from tessera.distributed.saved.storage import Storage

    write = Storage.write

    def write_or_hang(storage, name):
        if storage.full(name) == path:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mkfifo(path)  # opening it to write waits for a reader that never comes
        return write(storage, name)

    Storage.write = write_or_hang


def _die(path: str) -> None:
    from tessera.distributed.saved.storage import Storage

    write = Storage.write

    @contextmanager
    def write_or_die(storage, name):
        with write(storage, name) as stream:
            yield stream
            if storage.full(name) == path:
                os.kill(os.getpid(), signal.SIGKILL)

    Storage.write = write_or_die


def _wait(pids: list[int], seconds: float, statuses: dict[int, int]) -> list[int | None]:
    """`statuses` of the ended are kept for the next wait: the system gives each but once."""
    end = time.monotonic() + seconds
    while True:
        for pid in set(pids) - set(statuses):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if set(pids) <= set(statuses) or time.monotonic() >= end:
            break
        time.sleep(0.005)
    return [statuses.get(pid) for pid in pids]


def _serve(pipe: Connection) -> None:
    os.chdir(ROOT)
    statuses: dict[int, int] = {}
    with suppress(EOFError):
        while True:
            command = pipe.recv()
            if "wait" in command:
                answer = _wait(command["pids"], command["wait"], statuses)
            else:
                answer = [_fork_rank(rank, command) for rank in range(command["world"])]
                for pid in answer:  # an earlier child may have had it
                    statuses.pop(pid, None)
            pipe.send(answer)
