"""Restarts by the launcher: on one host by itself, and of one of two hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ctr.train.states import arguments, assert_same_end, write_data
from tests.ranks import PYTHONPATH, ROOT, free_port, torchrun

OPTIONS = ["trainer.batch_size=100", "trainer.eval_every=6", "trainer.checkpoint.every=4", "trainer.epochs=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", 1000)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run of 2 ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = torchrun(2, "scripts/train.py", *arguments(data, folder, *OPTIONS))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_restart_by_torchrun_goes_on_by_itself(data, whole, tmp_path):
    """Without trainer.resume: the launcher's store tells the restarted ranks which folder is theirs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    job = ["tests/ctr/train/once_killed_job.py", *arguments(data, tmp_path / "run", *OPTIONS)]
    environment = {"KILL_MARKER": str(tmp_path / "killed"), "KILL_AT": "13", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + job,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists() and "goes on from" in done.stdout
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_used_folder_stays_refused_after_restarts(data, tmp_path):
    """What the first start refuses must not be taken for the job's own folder by the second."""
    (tmp_path / "config.yaml").write_text("another: run\n")
    launcher = ["--standalone", "--nproc-per-node=1", "--max-restarts=1", "scripts/train.py"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, *arguments(data, tmp_path, *OPTIONS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def agent(node: int, port: int, log: Path, job: list[str]) -> subprocess.Popen:
    """One launcher of two, with one rank, in a process group of its own: a "host" that can be switched off."""
    endpoint = ["--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", *endpoint]
    with open(log, "a") as output:
        return subprocess.Popen(
            [*command, "--nproc-per-node=1", *job],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_hosts_dies_and_the_job_is_started_again(data, whole, tmp_path, victim):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = ["scripts/train.py", *arguments(data, run_dir, *OPTIONS, "trainer.resume=auto", "data.lanes=12")]
    port = free_port()
    agents = [agent(node, port, log, job) for node in range(2)]
    end = time.monotonic() + 120
    while not any((run_dir / "checkpoints").glob("step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    _switch_off(agents[victim])
    assert agents[1 - victim].wait(120) != 0, log.read_text()  # it notices by itself
    port = free_port()
    agents = [agent(node, port, log, job) for node in range(2)]
    assert [one.wait(180) for one in agents] == [0, 0], log.read_text()
    assert "goes on from" in log.read_text()
    assert_same_end(run_dir, whole)


def _switch_off(one: subprocess.Popen) -> None:
    """SIGKILL the launcher and its ranks, which have sessions of their own, as a power cut would."""
    for pid in [one.pid, *_children(one)]:
        os.kill(pid, signal.SIGKILL)
    one.wait()


def agent_that_meets(folder: Path, node: int, job: list[str]) -> subprocess.Popen:
    """One launcher of two that find each other in a file that both see, as docs/many_machines.md says."""
    rdzv = [f"--rdzv-endpoint={folder}/rdzv", "--rdzv-conf=store_type=file,keep_alive_interval=1", "--rdzv-id=job"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d", *rdzv]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / f"log-{node}", "a") as output:
        return subprocess.Popen(
            [*command, "--local-addr=127.0.0.1", "--max-restarts=3", "--nproc-per-node=1", *job],
            cwd=ROOT,
            env={**os.environ, **environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("victims", [[1, 0], [0, 1, 0, 1, 0, 1]])
def test_a_host_that_comes_back_joins_whichever_it_is(tmp_path, victims):
    """Each launcher in turn is killed, and only it: its rank ends by itself, and the other launcher goes on."""
    data = write_data(tmp_path / "data", 6000)
    options = ["trainer.batch_size=20", "trainer.eval_every=100", "trainer.checkpoint.every=20", "trainer.epochs=2"]
    undisturbed, run_dir = tmp_path / "whole", tmp_path / "run"
    done = torchrun(2, "scripts/train.py", *arguments(data, undisturbed, *options))
    assert done.returncode == 0, done.stderr
    job = ["scripts/train.py", *arguments(data, run_dir, *options, "trainer.resume=auto")]
    agents = [agent_that_meets(tmp_path, node, job) for node in range(2)]
    try:
        for victim in victims:
            _wait_for_next_state(run_dir, agents)
            rank = _children(agents[victim])
            agents[victim].kill()
            agents[victim].wait()
            _wait_until_gone(rank)
            agents[victim] = agent_that_meets(tmp_path, victim, job)
        assert [one.wait(180) for one in agents] == [0, 0], (tmp_path / "log-0").read_text()
    finally:
        for one in agents:
            one.kill()
    assert_same_end(run_dir, undisturbed)


def _wait_for_next_state(run_dir: Path, agents: list[subprocess.Popen]) -> None:
    def newest_name() -> str:
        return max((path.name for path in (run_dir / "checkpoints").glob("step-*")), default="")

    before, end = newest_name(), time.monotonic() + 150
    while newest_name() == before and time.monotonic() < end:
        assert [one.poll() for one in agents] == [None, None]
        time.sleep(0.02)
    assert newest_name() != before


def _wait_until_gone(pids: list[int]) -> None:
    """A rank whose launcher was killed ends by itself."""
    assert pids
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _children(one: subprocess.Popen) -> list[int]:
    done = subprocess.run(["ps", "--ppid", str(one.pid), "-o", "pid="], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]
