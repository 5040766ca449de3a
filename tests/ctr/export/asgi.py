"""A client of an ASGI application in the same process and loop, so that tests need no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Sends requests to an application that runs (`running`)."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def send(
        self, method: str, path: str, body: bytes | Sequence[bytes] = b"", headers: dict[str, str] | None = None
    ) -> Reply:
        """body: in one piece, or in several."""
        pieces = [body] if isinstance(body, bytes) else list(body)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()],
        }
        sent: list[dict] = []

        async def receive() -> dict:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        headers_of = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return Reply(sent[0]["status"], headers_of, b"".join(m.get("body", b"") for m in sent[1:]))

    async def post(self, path: str, value: Any, **headers: str) -> Reply:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        return await self.send("POST", path, content, {"content-type": "application/json", **headers})


@asynccontextmanager
async def running(app: Callable[..., Awaitable[None]]):
    """Start the application, yield a client, and stop it."""
    messages: asyncio.Queue = asyncio.Queue()
    done: asyncio.Queue = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, messages.get, done.put))
    await messages.put({"type": "lifespan.startup"})
    assert (await done.get())["type"] == "lifespan.startup.complete"
    try:
        yield Client(app)
    finally:
        await messages.put({"type": "lifespan.shutdown"})
        assert (await done.get())["type"] == "lifespan.shutdown.complete"
        await task
