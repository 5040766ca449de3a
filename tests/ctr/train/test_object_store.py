"""Training from and to an S3 server over HTTP: what is read, what is saved, what a kill inside a save leaves, and how a
job ends when the store is not there, is not ours, or goes away."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from tessera.distributed.saved.states import folder_name
from tessera.distributed.saved.storage import Storage
from tests.ctr.train.states import arguments, metrics_of, times_trained, write_data
from tests.ctr.train.warm_ranks import WarmRanks
from tests.object_store import CREDENTIALS
from tests.ranks import run_script, torchrun

ROWS, EPOCHS = 400, 2
OPTIONS = ["trainer.batch_size=40", f"trainer.epochs={EPOCHS}", "trainer.resume=auto", "trainer.checkpoint.every=4"]
OPTIONS += ["trainer.checkpoint.full_every=3", "trainer.checkpoint.keep_last=2", "model.dropout=0"]


@pytest.fixture(scope="module")
def ranks():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server = WarmRanks()
    yield server
    server.close()


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data", ROWS)


def command(data: Path | str, run_dir: Path, states: str | None, *more: str) -> list[str]:
    folder = [] if states is None else [f"trainer.checkpoint.folder={states}"]
    found = arguments(Path("unused"), run_dir, *OPTIONS, *folder, *more)
    return [f"data.path={data}" if one.startswith("data.path=") else one for one in found]


def errors(output: Path) -> list[str]:
    said = output.read_text()
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_a_run_is_the_same_wherever_its_data_and_states_are(store, ranks, data, tmp_path):
    store.put_folder("data", data)
    here, there = tmp_path / "here", tmp_path / "there"
    assert ranks.run(2, command(data, here, None), tmp_path / "output") == [0, 0]
    there_command = command(store.uri("data"), there, store.uri("states"))
    assert ranks.run(2, there_command, tmp_path / "output") == [0, 0], (tmp_path / "output").read_text()
    assert metrics_of(there) == metrics_of(here)
    # Retention leaves two states and what the deltas among them build on, and their files alone.
    states = Storage(store.uri("states"))
    assert states.names() == sorted(path.name for path in (here / "checkpoints").iterdir())
    newest = states.names()[-1]
    manifest = json.loads(states.read(f"{newest}/manifest.json"))
    assert states.below(newest).all_files() == sorted([*manifest["files"], "manifest.json"])
    # Only states go there: all else of a run is in its folder.
    assert {"best", "config.yaml", "metrics.jsonl", "report.html"} <= {path.name for path in there.iterdir()}
    assert not (there / "checkpoints").exists() and {name.split("/")[0] for name in store.objects()} == {
        "data",
        "states",
    }


@pytest.mark.slow
def test_a_kill_inside_a_save_leaves_objects_and_loses_nothing(store, ranks, data, tmp_path):
    """3 ranks, one killed while it writes; then 1 rank, which must not take what the others left for rows of a state;
    then a kill behind the manifest's place, and 2 ranks."""
    uri, output = store.uri("states"), tmp_path / "output"
    job = command(data, tmp_path / "run", uri)
    step = folder_name(12)
    ranks.start(3, job, output, die=f"bucket/states/{step}/rows/row/00001-of-00003.parquet")
    assert sorted(ranks.wait()) == [-9, 1, 1], output.read_text()
    left = [name for name in store.objects(f"states/{step}") if "-of-00003" in name]
    assert left and not any(name.endswith("manifest.json") for name in store.objects(f"states/{step}/"))
    assert ranks.run(1, [*job, "trainer.max_steps=13"], output) == [0], output.read_text()
    assert "goes on from" in output.read_text() and folder_name(8) in output.read_text()
    names = store.objects(f"states/{step}")
    assert names and not [name for name in names if "-of-00003" in name and "/best/" not in name]
    ranks.start(1, job, output, die=f"bucket/states/{folder_name(16)}/manifest.json")
    assert ranks.wait() == [-9]
    assert ranks.run(2, job, output) == [0, 0], output.read_text()
    newest = Storage(uri).names()[-1]
    assert newest == folder_name(20)
    states = store.get_folder("states", tmp_path / "states")
    assert times_trained(states / newest).tolist() == [EPOCHS] * ROWS


@pytest.mark.slow
def test_a_kill_inside_a_save_under_torchrun(store, data, tmp_path):
    """The launcher ends the other rank; one rank goes on without it."""
    job = command(data, tmp_path / "run", store.uri("states"))
    path = f"bucket/states/{folder_name(12)}/rows/row/00001-of-00002.parquet"
    done = torchrun(2, "tests/ctr/train/dying_job.py", path, *job)
    assert done.returncode != 0 and "rank 1 died" in done.stderr, done.stderr
    assert store.objects(f"states/{folder_name(12)}")
    done = run_script("scripts/train.py", *job)
    assert done.returncode == 0 and folder_name(8) in done.stdout, done.stderr
    states = store.get_folder("states", tmp_path / "states")
    assert times_trained(states / folder_name(20)).tolist() == [EPOCHS] * ROWS


def _refused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("what", ["data", pytest.param("states", marks=pytest.mark.slow)])
def test_a_bucket_that_is_not_there_or_does_not_answer_is_one_line(store, ranks, data, tmp_path, what):
    uris = {"": store.uri("x").replace("bucket/", "nobucket/")}
    if what == "states":
        uris["Could not connect to server"] = store.uri("x").replace(store.address, f"127.0.0.1:{_refused_port()}")
    for reason, uri in uris.items():
        job = command(uri, tmp_path / "run", None) if what == "data" else command(data, tmp_path / "run", uri)
        output = tmp_path / f"output-{len(reason)}"
        assert ranks.run(2, job, output) == [2, 2], output.read_text()
        (line,) = errors(output)
        where = uri.replace("/x?", "/x/train?") if what == "data" else uri
        assert where in line and reason in line
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_store_that_denies_is_one_line(store, ranks, data, tmp_path):
    store.answer_requests("0")  # the others are those of somebody who may not
    try:
        for job in (command(store.uri("x"), tmp_path / "run", None), command(data, tmp_path / "run", store.uri("x"))):
            output = tmp_path / f"output-{len(job)}"
            assert ranks.run(2, job, output) == [2, 2], output.read_text()
            (line,) = errors(output)
            assert (
                "s3://bucket/x" in line
                and store.address in line
                and ("ACCESS_DENIED" in line or "HTTP status 403" in line)
            )
    finally:
        store.answer_requests("inf")


@pytest.mark.slow
def test_a_store_that_goes_away_ends_all_ranks_with_one_line(store, ranks, data, tmp_path):
    """While states are saved, and while data are read; with the store back the same command goes on."""
    output, run = tmp_path / "output", tmp_path / "run"
    job = command(data, run, store.uri("states"), "trainer.epochs=1000")
    ranks.start(2, job, output)
    _wait_for(lambda: store.objects(f"states/{folder_name(8)}/manifest.json"))
    kept = {name: store.get(name) for name in store.objects()}
    port = store.stop()
    assert ranks.wait(90) == [2, 2], output.read_text()
    (line,) = errors(output)
    assert "cannot be written: rank " in line and "Could not connect" in line and "untouched" in line
    store.start(port)
    for name, content in kept.items():
        store.put(name, content)
    assert ranks.run(2, command(data, run, store.uri("states"), "trainer.max_steps=30"), output) == [0, 0]
    assert "goes on from" in output.read_text()


def _wait_for(condition, seconds: float = 60.0) -> None:
    import time

    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_a_reader_for_ever(monkeypatch):
    """It takes the connection and says nothing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "tests")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        uri = f"s3://bucket/x?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http"
        failed: list[BaseException] = []

        def read() -> None:
            try:
                Storage(uri).read("a")
            except OSError as error:
                failed.append(error)

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        reading.join(300)
        assert failed and "\n" not in str(failed[0])
