"""The server of exports, as an ASGI application (docs/serve.md)."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tessera.ctr.serving.batches import Batches, Busy, Limits
from tessera.ctr.serving.bodies import JSON, BadRequest, content_of, json_of, labels_of_body, request_of
from tessera.ctr.serving.errors import ExportError, RowError
from tessera.ctr.serving.feedback import Feedback
from tessera.ctr.serving.metrics import Metrics
from tessera.ctr.serving.scorer import Scorer
from tessera.ctr.serving.versions import Versions

Answering = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Settings:
    """versions: where a published model is followed, None: the export stays as it is. poll_seconds: between looks at
    what is published. threads: passes of the model at the same time. feedback: an error memory that corrects answers,
    saved every save_seconds."""

    limits: Limits = field(default_factory=Limits)
    versions: Versions | None = None
    poll_seconds: float = 5.0
    threads: int = 1
    feedback: Feedback | None = None
    save_seconds: float = 60.0


class Server:
    """One export that is served.

    Attributes:
        batches: set while the application runs.
    """

    def __init__(self, scorer: Scorer, settings: Settings, say: Callable[[str], None] | None = None) -> None:
        """say: told of each change of the model in one line; None: on standard error."""
        self.first, self.settings = scorer, settings
        self.metrics = Metrics()
        self.batches: Batches | None = None
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._problem = ""
        self._merge: threading.Thread | None = None
        self._not_merged = ""  # version that could not be, or is not any more

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/score", self._answering("/score", self._score), methods=["POST"]),
            Route("/rank", self._answering("/rank", self._rank), methods=["POST"]),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
        ]
        if self.settings.feedback is not None:
            routes.append(Route("/feedback", self._answering("/feedback", self._feedback), methods=["POST"]))
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _no_route})

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        settings = self.settings
        self._learn_of(self.first)
        self.batches = Batches(self.first, settings.limits, self.metrics.passed, settings.threads, settings.feedback)
        saving = asyncio.create_task(self._save_often()) if settings.feedback else None
        self.metrics.step.set(self.first.manifest["step"])
        following = asyncio.create_task(self._follow()) if settings.versions else None
        yield
        batches, self.batches = self.batches, None
        if following:
            following.cancel()
        await batches.close()
        if saving:
            saving.cancel()
            self._save()

    async def _follow(self) -> None:
        """Look at what is published again and again; the model is replaced between two passes."""
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "following")
        try:
            while True:
                await loop.run_in_executor(thread, self.update)
                self._start_merge()
                await asyncio.sleep(self.settings.poll_seconds)
        finally:
            thread.shutdown(wait=False)

    def update(self) -> bool:
        """Serve what is published now. Returns whether the model is another one than before. Problems are told, each
        once, and what is served stays."""
        batches, versions = self.batches, self.settings.versions
        if batches is None or versions is None:
            return False
        try:
            scorer = versions.update(batches.scorer)
        except Exception as error:  # also one of ours, of a publication that nobody thought of: the server goes on
            self.metrics.updates.labels("failed").inc()
            kind = "" if isinstance(error, (ExportError, OSError)) else f"{type(error).__name__}: "
            problem = kind + " ".join(str(error).split())
            if problem != self._problem:
                self._say(f"still serving {batches.scorer.version}: {problem}")
            self._problem = problem
            return False
        self._problem = ""
        if scorer is None:
            return False
        merged = scorer.version == batches.scorer.version
        batches.scorer = scorer
        self._learn_of(scorer)
        self.metrics.updates.labels("merged" if merged else "done").inc()
        self.metrics.step.set(scorer.manifest["step"])
        self._say(f"serving {scorer.version}{', its changes merged' if merged else ''}")
        return True

    def _start_merge(self) -> None:
        """Merge changes in a thread of its own where they have become many; one merge at a time."""
        batches, versions = self.batches, self.settings.versions
        if batches is None or versions is None or (self._merge and self._merge.is_alive()):
            return
        scorer = batches.scorer
        if scorer.version != self._not_merged and versions.merge_due(scorer):
            self._merge = threading.Thread(target=self._merged, args=(versions, scorer), name="merging", daemon=True)
            self._merge.start()

    def _merged(self, versions: Versions, scorer: Scorer) -> None:
        self._not_merged = scorer.version  # one attempt for each
        try:
            versions.merge(scorer)
        except (ExportError, OSError) as error:
            self._say(f"the changes up to {scorer.version} are not merged: {' '.join(str(error).split())}")

    def _learn_of(self, scorer: Scorer) -> None:
        """Forget the errors of another model than the one that is served."""
        feedback = self.settings.feedback
        if feedback is None:
            return
        if feedback.begin(scorer.base):
            self._say(f"the error memory is empty: {scorer.version} is another model")
        self.metrics.memory_rows.set(feedback.memory.rows)

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(self.settings.save_seconds)
            await asyncio.get_running_loop().run_in_executor(None, self._save)

    def _save(self) -> None:
        assert self.settings.feedback is not None
        try:
            self.settings.feedback.save()
        except OSError as error:
            self._say(f"the error memory cannot be saved: {error.strerror or error}")

    def _answering(self, path: str, answer: Answering) -> Answering:
        """Return the same with errors as one line of JSON, and counted."""

        async def answered(request: Request) -> Response:
            begun = time.perf_counter()
            try:
                response = await answer(request)
            except BadRequest as error:
                response = _error(error.status, str(error))
            except RowError as error:
                response = _error(422, str(error))
            except Busy as error:
                response = _error(503, str(error))
            except ClientDisconnect:
                response = _error(400, "the body ended early")
            except Exception as error:  # a fault of ours: the server lives, and says no more than its kind
                self._say(f"{path} failed: {error!r}")
                response = _error(500, type(error).__name__)
            self.metrics.requests.labels(path, str(response.status_code)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)
            return response

        return answered

    async def _score(self, request: Request) -> Response:
        return await self._scored(request, ranked=False)

    async def _rank(self, request: Request) -> Response:
        return await self._scored(request, ranked=True)

    async def _feedback(self, request: Request) -> Response:
        feedback = self.settings.feedback
        if feedback is None or self.batches is None:
            raise Busy("the server stops")
        labels = labels_of_body(json_of(await self._body(request)), self.settings.limits.rows)
        told = await asyncio.get_running_loop().run_in_executor(None, feedback.take, labels)
        for result, number in told.items():
            self.metrics.labels.labels(result).inc(number)
        self.metrics.memory_rows.set(feedback.memory.rows)
        return Response(json.dumps(told), media_type=JSON)

    async def _body(self, request: Request) -> bytes:
        limits = self.settings.limits
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise BadRequest(415, f"content encoding {encoding[:80]!r}; expected none")
        try:
            return await asyncio.wait_for(_body(request, limits.body_bytes), limits.timeout_seconds)
        except asyncio.TimeoutError:
            raise BadRequest(408, f"the body did not come within {limits.timeout_seconds:g} s") from None

    async def _scored(self, request: Request, *, ranked: bool) -> Response:
        limits, batches = self.settings.limits, self.batches
        if batches is None:
            raise Busy("the server stops")
        body = await self._body(request)
        asked = request_of(request.headers.get("content-type", ""), body, limits, ranked=ranked)
        answer = await batches.answer(asked)
        content, kind = content_of(answer, self.first.labels, request.headers.get("accept", ""))
        return Response(content, media_type=kind, headers={"x-model-version": answer.version})

    async def _health(self, request: Request) -> Response:
        return Response('{"status": "alive"}', media_type=JSON)

    async def _ready(self, request: Request) -> Response:
        if self.batches is None:
            return _error(503, "not ready")
        return Response(json.dumps({"version": self.batches.scorer.version}), media_type=JSON)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer a path or a method that the server has not, as other errors are answered."""
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}", error.headers)


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps({"error": message}), status, headers, JSON)


async def _body(request: Request, most: int) -> bytes:
    """Return the body. Raises BadRequest: it is larger than allowed; the rest of it is not read."""
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said[:20]) > most:
        raise BadRequest(413, f"a body of {int(said[:20]):,} bytes; expected at most {most:,}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise BadRequest(413, f"a body of more than {most:,} bytes")
        parts.append(part)
    return b"".join(parts)
