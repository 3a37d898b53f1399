"""Serve HTTP to clients that are not trusted: Starlette's routes on uvicorn, within limits.

    connections    bounded in number and in time without progress (`connections`)
    token          compared in constant time, before any of the body is read
    bodies         need a Content-Length within the limit, have a deadline, and are reserved in a
                   memory budget
    errors         {"error": one line}; an error of the server is logged once and answered with
                   500, an error of a client is answered with 4xx and not logged
    shutdown       SIGTERM and Ctrl-C let current requests finish, for `grace_seconds`

An app is a list of `starlette.routing.Route`, whose handlers raise `Refused`.
"""

import asyncio
import contextlib
import functools
import hmac
import logging
import signal
import socket
import threading
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any, cast

import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from blip3o_jax.config import UserError
from blip3o_jax.connections import BACKLOG, Connection, ConnectionLimits, allow_open_files

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_HEADERS = 1 << 16  # bytes before a body


class Refused(Exception):
    """Answer a request with `status` and one line, {"error": line}. 429 and 503 get a Retry-After
    of 1 s unless `headers` has one."""

    def __init__(self, status: int, line: str, headers: Mapping[str, str] | None = None):
        super().__init__(status, line, headers)  # `args`, which pickle calls the class with
        self.status = status
        self.line = " ".join(line.split())  # one line, whatever text it quotes
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", "1")

    def __str__(self) -> str:
        return self.line


class MemoryBudget:
    """Bound the bytes that all current requests take together. An eighth of `size` is for requests
    of up to `small` bytes only. Not thread-safe: use it in one event loop."""

    def __init__(self, size: int, small: int = 1 << 20):
        self.size = size
        self.reserved = 0
        self._small = small

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes for a `with` block. Raises Refused (503) if too few are free."""
        # The reserve for small requests: a few large bodies must not lock out health checks and
        # small clients.
        limit = self.size if size <= self._small else self.size - self.size // 8
        if self.reserved + size > limit:
            raise Refused(503, "the current requests take all the memory: try again later")
        self.reserved += size
        try:
            yield
        finally:
            self.reserved -= size


def content_length(request: Request, largest: int) -> int:
    """Return the length in bytes that the headers give. Raises Refused: 411 without a
    Content-Length, 400 if it is not a number, 413 if it exceeds `largest`."""
    length = request.headers.get("content-length")
    # A chunked body has no length in advance, for which memory could be reserved.
    if length is None or "transfer-encoding" in request.headers:
        raise Refused(411, "send the body in one piece, with its Content-Length")
    if not (length.isascii() and length.isdigit()):
        raise Refused(400, "Content-Length is not a number")
    # The number of digits first: Python refuses to convert more than 4300.
    if len(length) > 15 or int(length) > largest:
        raise Refused(413, f"the body is longer than {largest} bytes")
    return int(length)


async def read_body(request: Request, limits: ConnectionLimits) -> bytearray:
    """Read the whole body. Raises Refused (408) after `body_seconds` or `idle_seconds` without a
    piece, and ClientDisconnect if the client leaves."""
    body = bytearray()
    pieces = aiter(request.stream())
    try:
        # Two deadlines: the inner one for a client that has stopped, the outer one for a client
        # that sends a byte at a time.
        async with asyncio.timeout(limits.body_seconds):
            while True:
                async with asyncio.timeout(limits.idle_seconds):
                    body += await anext(pieces)
    except StopAsyncIteration:
        return body
    except TimeoutError:
        raise Refused(
            408, f"the body did not come within {limits.body_seconds:g} s, or stopped coming"
        ) from None


async def unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """Return the result of `work`, or cancel it and raise ClientDisconnect once the client has
    left. The body must have been read."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        _drop(task)
        raise
    finally:
        left.cancel()
    if not task.done():
        _drop(task)
        raise ClientDisconnect
    return task.result()


def _drop(task: asyncio.Future) -> None:
    """Cancel work whose result is not needed. Log an error in it, unless it is a refusal."""

    def log(task: asyncio.Future) -> None:
        if not task.cancelled() and not isinstance(task.exception(), Refused | None):
            logging.error("dropped work failed", exc_info=task.exception())

    task.cancel()
    task.add_done_callback(log)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Service:
    """Serve routes at one address, which the constructor binds.

    `port=0` takes a free port; `url` has it. `open_paths` need no token. `registry` gets the
    metrics PREFIX_requests_total and PREFIX_request_seconds. Raises UserError, which begins with
    `what`, if the address cannot be bound.
    """

    def __init__(
        self,
        what: str,
        routes: Sequence[BaseRoute],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        open_paths: Sequence[str] = (),
        limits: ConnectionLimits = ConnectionLimits(),
        registry: prometheus_client.CollectorRegistry | None = None,
        prefix: str = "http",
    ):
        self.what = what
        self.limits = limits
        self._token = token
        self._open_paths = tuple(open_paths)
        self._requests, self._seconds = _request_metrics(registry, prefix)
        self._app = Starlette(
            routes=list(routes),
            exception_handlers={
                HTTPException: _not_routed,
                Refused: _refused,
                ClientDisconnect: _gone,
                Exception: _failed,
            },
        )
        # A redirect would make clients send the body twice.
        self._app.router.redirect_slashes = False
        # Bound here, not by uvicorn: a port in use is an error of one line before anything is
        # started.
        self._socket = _bound(what, host, port)
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._serve_request,
                # uvicorn calls it as it would a class.
                http=cast("Any", functools.partial(Connection, limits=limits)),
                interface="asgi3",
                ws="none",
                lifespan="off",
                backlog=BACKLOG,
                log_config=None,
                log_level="error",  # uvicorn warns of every request that is not HTTP
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, int(limits.header_seconds)),
                timeout_graceful_shutdown=max(1, int(limits.grace_seconds)),
                h11_max_incomplete_event_size=MAX_HEADERS,
            )
        )

    @property
    def connections(self) -> int:
        """Return the number of open connections."""
        return len(self._server.server_state.connections)

    async def serve(self) -> None:
        """Serve until `stop` is called."""
        # Not Server.serve, which installs its own signal handlers; see `run_until_signal`.
        await self._server._serve([self._socket])

    def stop(self) -> None:
        """Finish current requests, then end `serve`. A second call ends it at once."""
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True

    def close(self) -> None:
        """Release the address."""
        self._socket.close()

    async def _serve_request(
        self, scope: dict[str, Any], receive: Callable, send: Callable
    ) -> None:
        answer = _Answer(scope, receive, send, self.limits)
        began = time.monotonic()
        try:
            await self._respond(scope, answer)
        except asyncio.CancelledError:  # grace_seconds are over
            if answer.status is None:
                ending = Refused(503, "the service is ending: try again later")
                with contextlib.suppress(_ClientStuck):
                    await _refusal(ending)(scope, answer.receive, answer.send)
        except _ClientStuck:  # `Connection` aborts a connection whose answer is incomplete
            pass
        except Exception:
            logging.exception("a request failed")
        finally:
            self._requests.labels(answer.status or 499).inc()
            self._seconds.observe(time.monotonic() - began)

    async def _respond(self, scope: dict[str, Any], answer: "_Answer") -> None:
        if (
            self._token
            and scope["path"] not in self._open_paths
            and not _has_token(scope, self._token)
        ):
            line = "the header 'Authorization: Bearer TOKEN' is missing or wrong"
            refusal = Refused(401, line, {"WWW-Authenticate": "Bearer"})
            await _refusal(refusal)(scope, answer.receive, answer.send)
        else:
            await self._app(scope, answer.receive, answer.send)


class _ClientStuck(Exception):
    """Signal that a client does not read its answer."""


class _Answer:
    """Wrap `receive` and `send` of one request: bound the time of each send, and close the
    connection after a refusal whose body is unread.

    It closes only once the body has been read and dropped, or after `linger_seconds`: the kernel
    resets a connection that is closed with unread data, and the client may lose the answer.
    """

    def __init__(
        self, scope: Mapping[str, Any], receive: Callable, send: Callable, limits: ConnectionLimits
    ):
        self._receive = receive
        self._send = send
        self._limits = limits
        names = {name for name, _ in scope["headers"]}
        self._unread = bool(names & {b"content-length", b"transfer-encoding"})
        self._closing = False
        self.status: int | None = None

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._closing = self._unread and self.status >= 400
            if self._closing:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
        elif self._closing and not message.get("more_body", False):
            # The answer is sent, but its end is held back while the rest of the body is read:
            # uvicorn closes the connection at the end.
            await self._bounded({**message, "more_body": True})
            if self.status != 408:  # this body has had its time already
                await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._bounded(message)

    async def _bounded(self, message: MutableMapping[str, Any]) -> None:
        """Send within `answer_seconds`. Raises _ClientStuck."""
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                await self._send(message)
        except TimeoutError:
            raise _ClientStuck from None

    async def _linger(self) -> None:
        """Read and drop the rest of the body, for up to `linger_seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.linger_seconds):
                while self._unread:
                    await self.receive()


def metrics_route(registry: prometheus_client.CollectorRegistry) -> Route:
    """Return the route GET /metrics, which serves `registry` in Prometheus' text format."""

    async def metrics(request: Request) -> Response:
        text = prometheus_client.generate_latest(registry)
        return Response(text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    return Route("/metrics", metrics, methods=["GET"])


def run_until_signal(services: Sequence[Service], ready: Callable[[], None]) -> signal.Signals:
    """Serve until SIGTERM or Ctrl-C, and return which it was. A second signal ends it at once.

    Call it in the main thread. `ready` is called once connections are accepted. Raises UserError if
    the system allows too few open files.
    """
    allow_open_files(services[0].what, [service.limits for service in services])
    return asyncio.run(_run_until_signal(services, ready))


async def _run_until_signal(
    services: Sequence[Service], ready: Callable[[], None]
) -> signal.Signals:
    caught: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        caught.append(number)
        for service in services:
            service.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    async with _serving(services) as tasks:
        ready()
        await asyncio.gather(*tasks)
    return caught[0]


@contextlib.asynccontextmanager
async def _serving(services: Sequence[Service]) -> AsyncIterator[list[asyncio.Task]]:
    tasks = [asyncio.create_task(service.serve()) for service in services]
    while not all(service._server.started for service in services):
        await asyncio.sleep(0.01)
    yield tasks


class BackgroundServer:
    """Serve in a thread of this process for the length of a `with` block."""

    def __init__(self, services: Sequence[Service]):
        self._services = services
        self._started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="http", daemon=True
        )

    def __enter__(self) -> "BackgroundServer":
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        for service in self._services:
            service.stop()
        self._thread.join()

    async def _run(self) -> None:
        async with _serving(self._services) as tasks:
            self._started.set()
            await asyncio.gather(*tasks)


def _has_token(scope: Mapping[str, Any], token: str) -> bool:
    sent = [value for name, value in scope["headers"] if name == b"authorization"]
    # Constant time: the time of `==` would reveal the token's first bytes.
    return len(sent) == 1 and hmac.compare_digest(sent[0], f"Bearer {token}".encode())


def _bound(what: str, host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A restart does not wait for connections of the last run in TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener
    except (OSError, OverflowError, UnicodeError) as error:  # OverflowError: a port beyond 65535
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{what}: cannot listen on {host}:{port}: {why}") from error


def _request_metrics(
    registry: prometheus_client.CollectorRegistry | None, prefix: str
) -> tuple[Any, Any]:
    registry = registry or prometheus_client.CollectorRegistry()
    requests = prometheus_client.Counter(
        f"{prefix}_requests",
        "requests by status; 499: the client left first",
        ["status"],
        registry=registry,
    )
    seconds = prometheus_client.Histogram(
        f"{prefix}_request_seconds", "from a request's headers to its answer", registry=registry
    )
    return requests, seconds


def _refusal(refused: Refused) -> Response:
    return JSONResponse({"error": refused.line}, refused.status, refused.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _refusal(error)


async def _gone(request: Request, error: Exception) -> Response:
    """Return 499, nginx's status for a client that has left: for the metrics, nobody reads it."""
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    """Answer an error of the server. Starlette raises `error` again, and `Service` logs it."""
    return _refusal(Refused(500, "the server failed; its log says why"))


async def _not_routed(request: Request, error: Exception) -> Response:
    """Answer a request that Starlette's router refuses."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:80]
    lines = {404: f"there is no {path}", 405: f"{path} does not take {request.method[:20]}"}
    return _refusal(
        Refused(error.status_code, lines.get(error.status_code, error.detail), error.headers)
    )
