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
    Callable,
    Mapping,
    Sequence,
)
from typing import Any, cast

import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from blip3o_jax.config import UserError
from blip3o_jax.serving.answer import Answer, ClientStuck
from blip3o_jax.serving.connections import BACKLOG, Connection, ConnectionLimits, allow_open_files
from blip3o_jax.serving.refused import Refused, refusal

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_HEADERS = 1 << 16  # bytes before a body


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
        answer = Answer(scope, receive, send, self.limits)
        began = time.monotonic()
        try:
            await self._respond(scope, answer)
        except asyncio.CancelledError:  # grace_seconds are over
            if answer.status is None:
                ending = Refused(503, "the service is ending: try again later")
                with contextlib.suppress(ClientStuck):
                    await refusal(ending)(scope, answer.receive, answer.send)
        except ClientStuck:  # `Connection` aborts a connection whose answer is incomplete
            pass
        except Exception:
            logging.exception("a request failed")
        finally:
            self._requests.labels(answer.status or 499).inc()
            self._seconds.observe(time.monotonic() - began)

    async def _respond(self, scope: dict[str, Any], answer: Answer) -> None:
        if (
            self._token
            and scope["path"] not in self._open_paths
            and not _has_token(scope, self._token)
        ):
            line = "the header 'Authorization: Bearer TOKEN' is missing or wrong"
            refused = Refused(401, line, {"WWW-Authenticate": "Bearer"})
            await refusal(refused)(scope, answer.receive, answer.send)
        else:
            await self._app(scope, answer.receive, answer.send)


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


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return refusal(error)


async def _gone(request: Request, error: Exception) -> Response:
    """Return 499, nginx's status for a client that has left: for the metrics, nobody reads it."""
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    """Answer an error of the server. Starlette raises `error` again, and `Service` logs it."""
    return refusal(Refused(500, "the server failed; its log says why"))


async def _not_routed(request: Request, error: Exception) -> Response:
    """Answer a request that Starlette's router refuses."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:80]
    lines = {404: f"there is no {path}", 405: f"{path} does not take {request.method[:20]}"}
    return refusal(
        Refused(error.status_code, lines.get(error.status_code, error.detail), error.headers)
    )
