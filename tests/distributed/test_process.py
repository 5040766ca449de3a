"""A failure is said once, after the launcher's trace, and names who failed and where; nobody hangs."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tessera.distributed import process as process_module
from tessera.distributed.failure import explain
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError
from tests.ranks import run_script, start_warm_torchrun, warm_torchrun

JOB = "tests/distributed/failing_job.py"


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_success_is_status_0_and_quiet():
    done = warm_torchrun(2, JOB, "nothing")
    assert done.returncode == 0
    assert "rank 0 is done" in done.stdout and "rank 1 is done" in done.stdout
    assert "rror" not in done.stderr


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("mistake_everywhere", "error: key x is 7; expected 1"),
        ("mistake_on_rank_1", "error: file f has column c twice"),
        ("bug", "error: rank 1, step 20: sum: ZeroDivisionError: a bug"),
        ("killed", "error: rank 1 died; it was last at step 20: sum"),
    ],
)
def test_the_last_line_tells_what_happened_once(how, line):
    done = warm_torchrun(2, JOB, how)
    assert done.returncode != 0
    assert last_line(done.stderr) == line
    own_lines = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert own_lines == [line]


@pytest.mark.slow
def test_a_hung_rank_is_named_after_the_limit():
    done = warm_torchrun(2, JOB, "hung", timeout=90)
    assert done.returncode != 0
    assert last_line(done.stderr).startswith("error: rank 1 did not answer; it has been at step 20: reading for ")


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGTERM, "stopped by SIGTERM, state saved"),
        pytest.param(signal.SIGINT, "stopped by Ctrl-C, state saved", marks=pytest.mark.slow),
    ],
)
def test_the_last_word_is_ours_where_the_launcher_is_told_to_end(tmp_path, number, line):
    """torchrun prints a trace of its own then."""
    launcher = start_warm_torchrun(2, JOB, "until_stopped", out=tmp_path / "said", err=tmp_path / "said")
    text, end = "", time.monotonic() + 60
    while text.count("ready") < 2 and time.monotonic() < end:
        text = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
        time.sleep(0.05)
    os.kill(launcher.pid, number)
    launcher.join(60)
    assert launcher.exitcode
    while last_line((tmp_path / "said").read_text()) != line and time.monotonic() < end:
        time.sleep(0.05)  # it is said when the launcher is gone
    text = (tmp_path / "said").read_text()
    assert last_line(text) == line and text.count("state saved") == 1


def test_without_torchrun_a_mistake_is_one_line_and_status_2():
    done = run_script(JOB, "mistake_everywhere")
    assert done.returncode == 2
    assert done.stderr == "error: key x is 7; expected 1\n"


def test_more_ranks_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert process_module._choose_device("auto", 1) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert process_module._choose_device("cpu", 2) == torch.device("cpu")
    for rank in range(3):
        with pytest.raises(ConfigError, match="3 ranks on this host, and torch finds 2 GPU"):
            process_module._choose_device("auto", rank)


def test_what_a_gpu_asserted_is_one_line():
    """The first call after it fails, whatever that is."""
    error = RuntimeError(
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
    )
    process = Process(1, 1, 2, torch.device("cuda", 1), dist.HashStore(), stage="step 7: forward")
    status, line = explain(error, process)
    assert status == 1 and "\n" not in line
    assert line.startswith("error: rank 1, step 7: forward: the GPU stopped at a failed assertion")
