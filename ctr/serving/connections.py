"""Close connections on which nothing goes on: of a client that sends its request byte by byte, or never reads its
answer. What the application does not see, as it begins with a whole head of a request, uvicorn itself waits for without
a limit."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_with_a_limit(seconds: float) -> type[H11Protocol]:
    """Return the protocol of connections that are closed when for so many seconds, or up to twice as many, they are at
    the same point: waiting for a head, for a body, for an answer, or for a client that reads."""

    class LimitedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._seen = self._point()
            self._timer: asyncio.TimerHandle = self.loop.call_later(seconds, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _point(self) -> tuple[object, ...]:
            cycle = self.cycle  # of the newest request, None before the first
            return (cycle, cycle.more_body, cycle.response_complete) if cycle else (None,)

        def _look(self) -> None:
            before, self._seen = self._seen, self._point()
            if before == self._seen:
                self.transport.abort()  # closing would wait until the client has read
            else:
                self._timer = self.loop.call_later(seconds, self._look)

    return LimitedProtocol
