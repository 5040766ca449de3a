"""Score concurrent requests together: those that come within a few milliseconds share one pass of the model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera.ctr.serving.errors import RowError
from tessera.ctr.serving.feedback import Feedback
from tessera.ctr.serving.scorer import Scorer


class Busy(Exception):
    """More requests wait than are allowed, or one has waited too long."""


@dataclass(frozen=True)
class Limits:
    """wait_seconds: longest time that a request waits for others to share its pass; batch_rows: rows of a pass that
    nobody waits for more; waiting: requests that wait, at most; timeout_seconds: for an answer, and for a body to
    come; body_bytes and rows: of a request, at most."""

    wait_seconds: float = 0.002
    batch_rows: int = 4096
    waiting: int = 1000
    timeout_seconds: float = 5.0
    body_bytes: int = 16 << 20
    rows: int = 10_000


@dataclass(frozen=True)
class Request:
    """Rows to score or, with a user, candidates to rank."""

    rows: Any
    count: int
    user: Any = None


@dataclass(frozen=True)
class Answer:
    """scores: float32 [n] or [n, labels], all of one model, `version`; keys: of the rows, by which their labels may
    come later, where they are waited for."""

    scores: np.ndarray
    version: str
    keys: list[str] | None = None


class Batches:
    """Takes requests from one event loop and scores them in threads.

    Attributes:
        scorer: what the next pass uses; may be replaced at any time. A pass keeps the one that it began with.
    """

    def __init__(
        self,
        scorer: Scorer,
        limits: Limits,
        note: Callable[[int, int, float], None],
        threads: int,
        feedback: Feedback | None = None,
    ) -> None:
        """note: told of each pass its requests, rows and seconds. threads: passes at the same time. feedback: corrects
        answers, and gives each row a key."""
        self._feedback = feedback
        self.scorer, self._limits, self._note = scorer, limits, note
        self._queue: asyncio.Queue[tuple[Request, asyncio.Future[Answer]]] = asyncio.Queue(limits.waiting)
        self._threads = ThreadPoolExecutor(threads, "scoring")
        self._workers = [asyncio.create_task(self._work()) for _ in range(threads)]

    async def answer(self, request: Request) -> Answer:
        """Score a request. Raises RowError: its rows cannot be scored; Busy: there is no answer in time."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((request, future))
        except asyncio.QueueFull:
            raise Busy(f"{self._limits.waiting} requests wait already") from None
        try:
            return await asyncio.wait_for(future, self._limits.timeout_seconds)
        except asyncio.TimeoutError:
            raise Busy(f"no answer within {self._limits.timeout_seconds:g} s") from None

    async def close(self) -> None:
        """Answer what waits, then end."""
        deadline = time.monotonic() + self._limits.timeout_seconds
        while not self._queue.empty() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._threads.shutdown(wait=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            begun = time.perf_counter()
            try:
                answers = await asyncio.shield(loop.run_in_executor(self._threads, self._score, batch))
            except Exception as error:  # of the model; each of its requests says so, and the next batch is served
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
            rows = sum(request.count for request, _ in batch)
            self._note(len(batch), rows, time.perf_counter() - begun)

    async def _next(self) -> list[tuple[Request, asyncio.Future[Answer]]]:
        batch = [await self._queue.get()]
        end = time.monotonic() + self._limits.wait_seconds
        rows = batch[0][0].count
        while rows < self._limits.batch_rows:
            left = end - time.monotonic()
            try:
                one = self._queue.get_nowait() if left <= 0 else await asyncio.wait_for(self._queue.get(), left)
            except (asyncio.QueueEmpty, asyncio.TimeoutError):
                break
            batch.append(one)
            rows += one[0].count
        return batch

    def _score(self, batch: Sequence[tuple[Request, asyncio.Future[Answer]]]) -> list[Answer | Exception]:
        scorer = self.scorer
        answers: list[Answer | Exception] = []
        inputs, places = [], []
        for place, (request, future) in enumerate(batch):
            answers.append(Busy("nobody waits for it any more"))
            if future.done():
                continue
            try:
                prepared = (
                    scorer.prepare(request.rows)
                    if request.user is None
                    else scorer.prepare_ranked(request.user, request.rows)
                )
            except RowError as error:
                answers[place] = error
                continue
            inputs.append(prepared)
            places.append(place)
        for place, (scores, hidden) in zip(places, scorer.predict_with_hidden(inputs), strict=True):
            keys = None
            if not np.isfinite(scores).all():
                answers[place] = RowError(_not_finite(scores))
                continue
            if self._feedback is not None:
                scores, keys = self._feedback.answer(scorer.base, scores, hidden)
            answers[place] = Answer(scores, scorer.version, keys)
        return answers


def _not_finite(scores: np.ndarray) -> str:
    row = int(np.argmin(np.isfinite(scores.reshape(len(scores), -1)).all(1)))
    return f"row {row}: the model's answer is {np.ravel(scores[row])[0]}, no number: its values are too large"
