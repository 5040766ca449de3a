"""A server under load while a run over days publishes: no request fails, and no answer is of two models."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from tessera.ctr.export.golden import scores_of
from tests.ctr.export.models import awkward_rows, export, touch
from tests.ctr.export.test_versions import Days
from tests.distributed.saved_tables import alone
from tests.ranks import PYTHONPATH

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from tessera.ctr.serving.app import Server, Settings

REQUESTS, DELTAS, CANDIDATES = 1000, 10, 200
USER = ("x", "y", "s", "h", "words", "c")


def of_one_user(count: int) -> pa.Table:
    """Return rows that share the columns of a user."""
    table = awkward_rows(count, seed=4)
    first = table.slice(0, 1)
    columns = {name: pa.concat_arrays([first[name].combine_chunks()] * count) for name in USER}
    return pa.table({name: columns.get(name, table[name]) for name in table.column_names})


class Client(threading.Thread):
    """Asks again and again over one connection; keeps status, version and scores of each answer."""

    def __init__(self, port: int, body: str, ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self.answers: list[tuple[int, str, np.ndarray]] = []
        self.problem: Exception | None = None
        self._port, self._body, self._ended = port, body, ended

    def run(self) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            while not self._ended.is_set():
                connection.request("POST", "/rank", self._body, {"content-type": "application/json"})
                answer = connection.getresponse()
                said = json.loads(answer.read())
                assert answer.headers["x-model-version"] == said["version"]
                self.answers.append((answer.status, said["version"], np.array(said["scores"], np.float32)))
        except Exception as error:
            self.problem = error


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ready(port: int) -> str:
    """Return the version that a server serves, waiting for its start."""
    for _ in range(3000):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/ready")
            return str(json.loads(connection.getresponse().read())["version"])
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def until(condition, what: str) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(what)


def touch_a_little(process, config, model, path: Path, seed: int = 0, now: int = 1) -> None:
    """Touch rows as `touch` does, and leave dense weights near where they were, so that no score comes to 1."""
    dense = list(model.module.dense_parameters().values())
    before = [value.detach().clone() for value in dense]
    touch(process, config, model, path, seed, now)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value, had in zip(dense, before, strict=True):
            value.copy_(had + (torch.rand(had.shape, generator=draw) - 0.5) * 0.2)


def test_an_update_that_fails_as_nobody_thought_leaves_what_is_served():
    def update(current) -> None:
        raise KeyError("tables")

    said: list[str] = []
    serving: Any = SimpleNamespace(version="model-1")
    versions: Any = SimpleNamespace(update=update)
    server = Server(serving, Settings(versions=versions), say=said.append)
    server.batches = SimpleNamespace(scorer=serving)  # type: ignore[assignment]
    assert not server.update() and not server.update()
    assert said == ["still serving model-1: KeyError: 'tables'"]
    assert b'tessera_model_updates_total{result="failed"} 2.0' in server.metrics.text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_answers_while_changes_are_applied_and_merged_are_each_of_one_model(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tests.ctr.export.test_versions.touch", touch_a_little)
    rows = of_one_user(CANDIDATES)
    items = rows.drop_columns(["label", "buy", "price"]).to_pylist()
    candidates = [{name: value for name, value in item.items() if name not in USER} for item in items]
    body = json.dumps({"user": {name: items[0][name] for name in USER}, "candidates": candidates})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    port, ended = free_port(), threading.Event()
    clients = [Client(port, body, ended) for _ in range(3)]
    try:
        days = Days(alone(), tmp_path)
        days.publish("full")
        export(alone(), tmp_path)
        expected = {"2026-01-01": scores_of(days.model, days.config, rows)}
        command = [sys.executable, "-m", "tessera.scripts.serve", str(tmp_path / "export"), "--port", str(port)]
        command += ["--follow", f"{tmp_path}/run/published", "--poll-seconds", "0.1", "--merge-share", "0.05"]
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
            try:
                ready(port)
                for client in clients:
                    client.start()
                for day in range(2, DELTAS + 2):
                    days.publish("delta")
                    name = f"2026-01-{day:02d}"
                    expected[name] = scores_of(days.model, days.config, rows)
                    until(lambda name=name: ready(port).startswith(name), f"{name} is not served")
                until(lambda: sum(len(client.answers) for client in clients) >= REQUESTS, "too few answers")
            finally:
                ended.set()
                for client in clients:
                    if client.ident is not None:
                        client.join(timeout=60)
                server.send_signal(signal.SIGTERM)
                said = server.communicate(timeout=60)[1]
    finally:
        dist.destroy_process_group()
    assert server.returncode in (0, -signal.SIGTERM) and [client.problem for client in clients] == [None] * 3
    answers = [answer for client in clients for answer in client.answers]
    assert len(answers) >= REQUESTS and {status for status, _, _ in answers} == {200}
    assert {version[:10] for _, version, _ in answers} == set(expected)
    for _, version, scores in answers:
        np.testing.assert_allclose(scores, expected[version[:10]], rtol=0, atol=1e-6, err_msg=version)
    assert "its changes merged" in said and "still serving" not in said
    assert min(np.abs(a - b).max() for a, b in zip(list(expected.values())[1:], expected.values(), strict=False)) > 1e-4
