"""Clients that hold connections and say nothing, or say it byte by byte, or never read, are hung up on; others are
answered meanwhile."""

from __future__ import annotations

import asyncio

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")

LONG = 8 << 20  # more than sockets take in
HEAD = b"POST /score HTTP/1.1\r\nhost: a\r\n"
ASK = HEAD + b"content-length: 0\r\n\r\n"


async def application(scope, receive, send) -> None:
    """Answers with eight megabytes, before the body has come, or not at all."""
    if scope["path"] == "/never":
        await asyncio.sleep(600)
    while scope["path"] != "/early" and (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LONG)]})
    await send({"type": "http.response.body", "body": b"x" * LONG})


async def hold(port: int, first: bytes, again: bytes = b"") -> None:
    """Send bytes, then others again and again, and read nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    writer.write(first)
    try:
        while True:
            writer.write(again)
            await asyncio.sleep(0.02)
    finally:
        writer.transport.abort()


async def ask(port: int) -> None:
    """Ask several times over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(6):
        writer.write(ASK)
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(LONG)
        await asyncio.sleep(0.1)
    writer.close()


def test_connections_on_which_nothing_goes_on_are_closed():
    from tessera.ctr.serving.connections import protocol_with_a_limit

    async def run() -> None:
        closed: list[object] = []

        class Protocol(protocol_with_a_limit(0.2)):
            def connection_lost(self, error: Exception | None) -> None:
                closed.append(self)
                super().connection_lost(error)

        config = uvicorn.Config(application, port=0, log_level="error", lifespan="off", http=Protocol, ws="none")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port, longer = server.servers[0].sockets[0].getsockname()[1], b"content-length: 999999\r\n\r\n"
        clients = [
            hold(port, b""),
            hold(port, HEAD),
            hold(port, HEAD, b"a: b\r\n"),
            hold(port, HEAD + longer, b"a"),
            hold(port, HEAD.replace(b"/score", b"/early") + longer, b"a"),
            hold(port, ASK.replace(b"/score", b"/never")),
            hold(port, ASK),
        ]
        holding = [asyncio.create_task(one) for one in clients]
        await asyncio.wait_for(ask(port), 30)
        while len(closed) <= len(clients):
            await asyncio.sleep(0.01)
        for one in holding:
            one.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
        server.should_exit = True
        for task in server.server_state.tasks:
            task.cancel()
        await serving

    asyncio.run(asyncio.wait_for(run(), 60))
