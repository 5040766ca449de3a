"""A server that learns from labels that come late, and what an export and a score command know rows by."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.score_rows import score_rows
from tessera.ctr.serving import Scorer
from tessera.ctr.serving.error_memory import ErrorMemory, MemorySettings
from tessera.ctr.serving.feedback import Feedback, Waiting
from tessera.embedding.errors import ConfigError
from tests.ctr.export.asgi import Client, running
from tests.ctr.export.models import awkward_rows, export, make_run, overrides_of
from tests.distributed.saved_tables import alone

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from tessera.ctr.serving.app import Server, Settings
from tessera.ctr.serving.batches import Limits

STRONG = MemorySettings(arrays=4, bits=3, strength=0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        make_run(alone(), folder, overrides_of(folder, model="dnn"))
        export(alone(), folder, hidden=True)
    finally:
        dist.destroy_process_group()
    return folder


def score_with_a_memory(folder: Path) -> None:
    """Fill a memory by what the export knows of rows, and score rows with it as `tessera score --memory` does."""
    scorer, rows = Scorer.load(folder / "export"), awkward_rows(80, seed=4)
    ((prediction, hidden),) = scorer.predict_with_hidden([scorer.prepare(rows)])
    memory = ErrorMemory(scorer.description.hidden, STRONG, scorer.base)
    memory.add(torch.from_numpy(hidden), torch.from_numpy(rows["label"].to_numpy()), torch.from_numpy(prediction))
    memory.save(folder / "memory")
    pq.write_table(awkward_rows(50, seed=6), folder / "requests.parquet")
    for name, chosen in (("plain", None), ("corrected", folder / "memory")):
        config = run_config(folder / "run", [])
        score_rows(config, alone(), folder / "run", folder / "requests.parquet", folder / name, memory=chosen)
    memory.clear("another")
    memory.save(folder / "of another")
    with pytest.raises(ConfigError, match="is of model another, and this one is .*; expected that of the same model"):
        again = run_config(folder / "run", [])
        score_rows(
            again, alone(), folder / "run", folder / "requests.parquet", folder / "x", memory=folder / "of another"
        )
    with pytest.raises(ConfigError, match="holds predictions of another error memory"):
        again = run_config(folder / "run", [])
        score_rows(again, alone(), folder / "run", folder / "requests.parquet", folder / "corrected")


def predictions(folder: Path) -> np.ndarray:
    return pq.read_table(folder / "requests.parquet")["prediction"].to_numpy()


@pytest.mark.slow
def test_score_corrects_as_the_memory_says_of_what_the_export_knows(folder):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        score_with_a_memory(folder)
    finally:
        dist.destroy_process_group()
    scorer = Scorer.load(folder / "export")
    ((prediction, hidden),) = scorer.predict_with_hidden([scorer.prepare(awkward_rows(50, seed=6))])
    np.testing.assert_allclose(predictions(folder / "plain"), prediction, rtol=0, atol=1e-6)
    memory = ErrorMemory.load(folder / "memory")
    expected = memory.corrected(torch.from_numpy(hidden), torch.from_numpy(prediction)).numpy()
    np.testing.assert_allclose(predictions(folder / "corrected"), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - prediction).max() > 0.01


def rows_of(count: int, seed: int = 0) -> list[dict]:
    return awkward_rows(count, seed).drop_columns(["label", "buy", "price"]).to_pylist()


def serve(scorer: Scorer, feedback: Feedback, test) -> Server:
    server = Server(scorer, Settings(Limits(), feedback=feedback), say=lambda line: None)

    async def run() -> None:
        async with running(server.app()) as client:
            await test(client)

    asyncio.run(run())
    return server


def feedback_of(scorer: Scorer, folder: Path | None = None, **settings) -> Feedback:
    memory = ErrorMemory(scorer.description.hidden, MemorySettings(arrays=4, bits=3, **settings), scorer.base)
    return Feedback(memory, folder)


def test_labels_that_come_late_correct_what_comes_behind_them(folder, tmp_path):
    scorer, rows = Scorer.load(folder / "export"), rows_of(40)
    expected = scorer(rows)
    feedback = feedback_of(scorer, tmp_path, strength=0.9)

    async def test(client: Client) -> None:
        first = (await client.post("/score", {"rows": rows})).json()
        np.testing.assert_array_equal(np.float32(first["scores"]), expected)
        assert len(set(first["keys"])) == 40
        again = (await client.post("/score", {"rows": rows})).json()
        assert again["scores"] == first["scores"] and not set(again["keys"]) & set(first["keys"])
        labels = [{"key": key, "label": 1} for key in first["keys"]]
        told = await client.post("/feedback", {"labels": [*labels, labels[0], {"key": "nobody-0", "label": 0}]})
        assert told.json() == {"taken": 40, "unknown": 1, "repeated": 1, "stale": 0}
        later = np.float32((await client.post("/score", {"rows": rows})).json()["scores"])
        assert (later >= expected).all() and later.mean() > expected.mean() + 0.1
        user = {name: rows[0][name] for name in ("x", "s")}
        ranked = await client.post("/rank", {"user": user, "candidates": rows[:3]})
        assert len(ranked.json()["keys"]) == 3
        metrics = (await client.send("GET", "/metrics")).body.decode()
        assert "tessera_memory_rows 40.0" in metrics
        assert 'tessera_feedback_labels_total{result="taken"} 40.0' in metrics

    serve(scorer, feedback, test)
    saved = ErrorMemory.load(tmp_path)
    assert (saved.rows, saved.base) == (40, scorer.base), "it is saved when the server stops"


def test_without_strength_it_is_the_model_bit_for_bit(folder):
    scorer, rows = Scorer.load(folder / "export"), rows_of(30)

    async def test(client: Client) -> None:
        first = (await client.post("/score", {"rows": rows})).json()
        await client.post("/feedback", {"labels": [{"key": key, "label": 0} for key in first["keys"]]})
        assert (await client.post("/score", {"rows": rows})).json()["scores"] == first["scores"]

    serve(scorer, feedback_of(scorer, strength=0.0), test)


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        (b"{", 400, "the body is no JSON"),
        ({"labels": {}}, 400, "expected an object with labels, a list of"),
        ({"labels": [{"key": 3, "label": 1}]}, 422, "label 0: expected an object with key, a text, and label"),
        ({"labels": [{"key": "a-0", "label": 2}]}, 422, "label 0: found 2, expected 0 or 1"),
        ({"labels": [{"key": "a-0", "label": True}]}, 422, "label 0: found True, expected 0 or 1"),
        ({"labels": [{"key": "a-0", "label": [1]}]}, 422, "expected 0 or 1"),
        ({"labels": [{"key": "", "label": 1}] * 10_001}, 413, "10,001 labels; expected at most 10,000"),
    ],
)
def test_bad_feedback_is_one_line(folder, body, status, line):
    scorer = Scorer.load(folder / "export")

    async def test(client: Client) -> None:
        answer = await client.post("/feedback", body)
        assert answer.status == status and line in answer.json()["error"], answer.body

    serve(scorer, feedback_of(scorer), test)


def test_there_is_no_feedback_without_a_memory(folder):
    async def run() -> None:
        async with running(Server(Scorer.load(folder / "export"), Settings()).app()) as client:
            assert (await client.post("/feedback", {"labels": []})).status == 404
            assert "keys" not in (await client.post("/score", {"rows": rows_of(2)})).json()

    asyncio.run(run())


def test_answers_wait_for_labels_so_long_and_so_many_and_of_one_model(folder):
    scorer, now = Scorer.load(folder / "export"), [0.0]
    memory = ErrorMemory(2, MemorySettings(arrays=1, bits=0), "one")
    feedback = Feedback(memory, None, Waiting(rows=5, seconds=10), clock=lambda: now[0])
    hidden, prediction = np.ones((3, 2), np.float32), np.full(3, 0.5, np.float32)
    _, first = feedback.answer("one", prediction, hidden)
    _, second = feedback.answer("one", prediction, hidden)
    assert feedback.take([(key, 1) for key in first])["unknown"] == 3, "six rows would wait, five may"
    assert feedback.take([(second[0], 1), (f"{second[0]}9" * 5, 1), (second[0] + "é", 0)])["taken"] == 1
    zeros = second[1].removesuffix("1") + "0" * 9
    assert feedback.take([(f"{zeros}9", 1), (zeros + "9" * 5000, 1)])["unknown"] == 2
    now[0] = 11.0
    assert feedback.take([(second[1], 1)])["unknown"] == 1, "it came too late"
    _, third = feedback.answer("one", prediction, hidden)
    assert feedback.begin("two") and not feedback.begin("two") and memory.rows == 0
    assert feedback.take([(third[0], 1)])["stale"] == 1 and memory.rows == 0, "the model is another one now"
    found, _ = feedback.answer("one", prediction, hidden)
    assert np.array_equal(found, prediction), "a pass of the model before is not corrected by errors of this one"
    assert len(scorer.base) == 16
