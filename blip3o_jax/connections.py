"""Connections of an HTTP service (`serving`): what each may take, and how many there may be."""

import asyncio
import dataclasses
import logging
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTION_BYTES = 1 << 19  # that a connection's buffers may take
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of connections; all times in seconds. `header_seconds`: from a connection, or from the
    answer before, to the end of a request's headers. `idle_seconds`, `body_seconds`: between two
    pieces of a body, and for all of it. `answer_seconds`: for a client to take its answer.
    `linger_seconds`: for which a client that is refused while it sends may go on, so that it gets
    to read why. `grace_seconds`: for requests at hand when the service ends."""

    max_connections: int = 512
    header_seconds: float = 10.0
    idle_seconds: float = 5.0
    body_seconds: float = 60.0
    answer_seconds: float = 10.0
    linger_seconds: float = 1.0
    grace_seconds: float = 10.0


class Connection(H11Protocol):
    """uvicorn's connection, with a deadline whenever it carries no request, and never more than so
    many of them."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._since = time.monotonic()  # of its state

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait_for(self._limits.header_seconds)
        if len(self.connections) > self._limits.max_connections:
            self._make_room()

    def _make_room(self) -> None:
        """Cut off the connection that has been without a request for longest, else the one that has
        sent a body for longest; this one where all are at work."""
        others = [connection for connection in self.connections if connection is not self]
        idle = [connection for connection in others if connection._idle()]
        sending = [
            connection
            for connection in others
            if not connection._idle() and connection.cycle.more_body
        ]
        if candidates := idle or sending:
            min(candidates, key=lambda connection: connection._since)._abort()
        else:
            self.transport.write(BUSY)
            self._abort_soon()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception:  # uvicorn stumbles over some of what is no HTTP
            logging.debug("a connection broke", exc_info=True)
            self._abort()
            return
        if not self._idle():
            self._stop_timer()

    def on_response_complete(self) -> None:
        self._wait_for(self._limits.header_seconds)
        super().on_response_complete()
        if not self._idle():  # the next request had come already
            self._stop_timer()

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except Exception:  # of a connection that is broken already
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _wait_for(self, seconds: float) -> None:
        self._stop_timer()
        self._since = time.monotonic()
        self._timer = self.loop.call_later(seconds, self._abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._since = time.monotonic()

    def _abort(self) -> None:
        self.connections.discard(self)  # counts no more; the transport is lost a moment later
        self.transport.abort()

    def _abort_soon(self) -> None:
        self.connections.discard(self)
        self.transport.close()
        self._wait_for(1.0)
