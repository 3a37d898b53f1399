"""Bound the connections of an HTTP service (`serving`): their number, and the time of each."""

import asyncio
import dataclasses
import functools
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip3o_jax.config import UserError

CONNECTION_BYTES = 1 << 19  # upper bound of the buffers of one connection
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Retry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


# The length of the queue of new connections. asyncio accepts up to as many a turn of the loop, and
# closes what exceeds `max_connections` three turns later.
BACKLOG = 128
OTHER_FILES = 128  # of the process: pipes to other processes, libraries, standard streams


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
    """Bound the number of connections and the time of each phase, in seconds.

    header_seconds     from the connection or the previous answer to the end of the headers
    idle_seconds       between two pieces of a body
    body_seconds       for the whole body
    answer_seconds     for the client to read its answer
    linger_seconds     to drop the rest of a refused body, so that the client reads the answer
    grace_seconds      for current requests to finish when the service ends
    """

    max_connections: int = 512
    header_seconds: float = 10.0
    idle_seconds: float = 5.0
    body_seconds: float = 60.0
    answer_seconds: float = 10.0
    linger_seconds: float = 1.0
    grace_seconds: float = 10.0


def allow_open_files(what: str, services: Sequence[ConnectionLimits]) -> None:
    """Raise the process's soft limit of open files to what its services can need.

    Beyond it, asyncio cannot accept a connection, logs a traceback and accepts none for a second.
    Raises UserError, which begins with `what`, if the hard limit is lower.
    """
    needed = OTHER_FILES + sum(limits.max_connections + 4 * BACKLOG for limits in services)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{what}: the connections need up to {needed} open files, but the system allows {hard}:"
            f" raise the hard limit (ulimit -Hn {needed})"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Connection(H11Protocol):
    """Bound uvicorn's connection in number and time.

    A deadline runs whenever a connection carries no request. uvicorn learns that a client has left
    from `connection_lost`, one turn of the loop after the connection was closed; an answer sent
    meanwhile would fail in h11. So whatever closes a connection here marks its request as
    disconnected at once: uvicorn then drops what the app sends, and `receive` returns
    `http.disconnect`.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.app = functools.partial(self._run_app, self.app)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._since = time.monotonic()  # when its state last changed

    def connection_made(  # type: ignore[override]  # uvicorn names a narrower type too
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._wait_for(self._limits.header_seconds)
        if len(self.connections) > self._limits.max_connections:
            self._make_room()

    def _make_room(self) -> None:
        """Abort the connection that has carried no request for longest, else the one that has sent
        a body for longest. Refuse this one where the others all wait for an answer."""
        # uvicorn's set is of all its protocols; a server's connections are of this class.
        others = [
            connection
            for connection in self.connections
            if isinstance(connection, Connection) and connection is not self
        ]
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
            self.connections.discard(self)
            self._close(1.0)

    def _idle(self) -> bool:
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.disconnected

    async def _run_app(
        self, app: Callable[..., Awaitable[None]], scope: Any, receive: Any, send: Any
    ) -> None:
        """Run `app` for one request. Abort the connection if its answer stays incomplete."""
        cycle = self.cycle
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:  # the loop ends; uvicorn would log this as an error
            pass
        finally:
            if not (cycle.response_complete or cycle.disconnected):
                self._abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._idle():
            self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, unless the answer to this request has begun already."""
        self._disconnect_request()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        self._close(self._limits.answer_seconds)

    def on_response_complete(self) -> None:
        self._wait_for(self._limits.header_seconds)
        super().on_response_complete()
        if not self._idle():  # the next request had come already
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _wait_for(self, seconds: float) -> None:
        """Abort the connection after `seconds` without a request."""
        self._stop_timer()
        self._since = time.monotonic()
        self._timer = self.loop.call_later(seconds, self._abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._since = time.monotonic()

    def _disconnect_request(self) -> None:
        """Mark the current request, if any, as one whose client has left."""
        if not self._idle():
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _abort(self) -> None:
        """Close the connection and drop what it has not sent."""
        self._disconnect_request()
        self.connections.discard(self)  # counts no more; `connection_lost` follows
        self.transport.abort()

    def _close(self, seconds: float) -> None:
        """Close the connection once it has sent what was written, within `seconds`."""
        self.transport.close()
        self._wait_for(seconds)
