"""Run a service over real sockets: admission, time limits, and room made by idle connections."""

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import prometheus_client
import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from blip3o_jax.config import UserError
from blip3o_jax.serving import bodies
from blip3o_jax.serving.bodies import MemoryBudget
from blip3o_jax.serving.connections import BUSY, ConnectionLimits, allow_open_files
from blip3o_jax.serving.refused import Refused
from blip3o_jax.serving.service import BackgroundServer, Service, metrics_route

LIMITS = ConnectionLimits(
    max_connections=8,
    header_seconds=0.4,
    idle_seconds=0.2,
    body_seconds=0.6,
    answer_seconds=0.5,
    linger_seconds=5.0,
)
TOKEN = b"Authorization: Bearer secret\r\n"


async def count(request):
    """Return the length of the body; on request, wait until the client leaves."""
    if "wait" in request.query_params:
        await bodies.unless_disconnected(request, asyncio.sleep(20))
    bodies.content_length(request, 1 << 24)
    return JSONResponse(len(await bodies.read_body(request, LIMITS)))


async def large(request):
    return Response(bytes(1 << 24))  # more than the buffers of a socket take


async def stumble(request):
    raise KeyError("stumbled")


async def busy(request):
    raise Refused(503, "come\nback")


@pytest.fixture(scope="module")
def registry():
    return prometheus_client.CollectorRegistry()


@pytest.fixture(scope="module")
def service(registry):
    routes = [
        Route("/count", count, methods=["POST"]),
        Route("/large", large),
        Route("/stumble", stumble),
        Route("/busy", busy),
        Route("/open", lambda request: JSONResponse("open")),
        metrics_route(registry),
    ]
    service = Service(
        "test",
        routes,
        token="secret",
        open_paths=("/open",),
        limits=LIMITS,
        registry=registry,
        prefix="t",
    )
    with BackgroundServer([service]):
        yield service
    service.close()


def connected(service) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def raw(service, *pieces: bytes) -> bytes:
    """Return the whole answer to raw bytes."""
    with connected(service) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return rest(connection)


def exchange(service, data: bytes) -> bytes:
    """Return the first answer to raw bytes, whether or not more is expected."""
    with connected(service) as connection:
        connection.sendall(data)
        answer = b""
        while not answer.endswith(b"}") and (read := connection.recv(65536)):
            answer += read
        return answer


def rest(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while read := connection.recv(65536):
            answer += read
    return answer


def post(headers: bytes, body: bytes = b"", path: bytes = b"/count") -> bytes:
    return (
        b"POST "
        + path
        + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        + headers
        + b"\r\n"
        + body
    )


def test_a_body_is_taken(service):
    assert raw(service, post(TOKEN + b"Content-Length: 3\r\n", b"abc")).endswith(b"\r\n\r\n3")


@pytest.mark.parametrize(
    "token", [b"", b"Authorization: Bearer secre\r\n", TOKEN * 2, b"Authorization: Bearer \xe9\r\n"]
)
def test_the_token_is_checked_before_the_body_is_read(service, token):
    answer = exchange(service, post(token + b"Content-Length: 9000\r\n"))
    assert (
        answer.startswith(b"HTTP/1.1 401 ")
        and b"www-authenticate: Bearer" in answer
        and b"missing or wrong" in answer
    )


def test_who_is_refused_while_sending_gets_to_read_why(service):
    """Send eight megabytes, which do not fit into the socket's buffers: closing at once would reset
    the connection."""
    assert b"missing or wrong" in raw(
        service, post(b"Content-Length: 8000000\r\n", bytes(8_000_000))
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Content-Length: 10000000000\r\n", 413),
        (b"Content-Length: " + b"9" * 19 + b"\r\n", 413),
        (b"Content-Length: -5\r\n", 400),
        (b"Content-Length: many\r\n", 400),
        (b"Content-Length: 1\r\nContent-Length: 2\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n", 411),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", 411),
        (b"", 411),
        (b"Expect: 100-continue\r\nContent-Length: 10000000000\r\n", 413),
    ],
)
def test_the_headers_alone_are_answered(service, headers, status):
    answer = exchange(service, post(TOKEN + headers))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and b"100 Continue" not in answer


def test_a_body_is_asked_for_once_the_headers_are_in_order(service):
    answer = raw(service, post(TOKEN + b"Expect: 100-continue\r\nContent-Length: 3\r\n", b"abc"))
    assert answer.startswith(b"HTTP/1.1 100 ") and b"HTTP/1.1 200 OK" in answer


@pytest.mark.parametrize(
    ("method", "path", "status", "line"),
    [
        ("GET", "/nothing", 404, "there is no /nothing"),
        ("DELETE", "/count", 405, "/count does not take DELETE"),
        ("GET", "/busy", 503, "come back"),
        ("GET", "/stumble", 500, "the server failed; its log says why"),
    ],
)
def test_errors_are_one_line_of_json(service, method, path, status, line, caplog):
    answer = raw(
        service,
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n".encode() + TOKEN + b"\r\n",
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f" {status} ".encode() in head and json.loads(body) == {"error": line}
    assert (b"retry-after: 1" in head, b"allow: POST" in head) == (status == 503, status == 405)
    assert ("stumbled" in caplog.text) == (status == 500)


@pytest.mark.parametrize(
    "request_",
    [
        b"FLY\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000,
        b"\0\xff\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request(service, request_):
    assert raw(service, request_).startswith(b"HTTP/1.1 400 ")


CHUNKED = b"POST /count HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + TOKEN + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"zz\r\n", b"400"),  # uvicorn answers before the app does
        (b"3\r\nabc\r\nzz\r\n", b"400"),
        (b"", b"411"),  # the app answers before the rest comes
    ],
)
def test_a_body_that_is_not_http_is_not_an_error_of_the_server(service, caplog, sent, status):
    with connected(service) as connection:
        connection.sendall(CHUNKED + sent)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 " + status)
        connection.sendall(b"zz\r\n")
        rest(connection)
    until(lambda: service.connections == 0 and not service._server.server_state.tasks)
    assert caplog.records == []


def test_who_does_not_take_an_answer_is_cut_off(service, caplog):
    """Fill the buffers with the first answer, so that the second one cannot begin."""
    with connected(service) as connection:
        connection.sendall((b"GET /large HTTP/1.1\r\nHost: a\r\n" + TOKEN + b"\r\n") * 2)
        until(lambda: service._server.server_state.tasks)
        until(lambda: service.connections == 0, 5.0)
        assert len(rest(connection)) < 1 << 24
    assert caplog.records == []


def test_errors_of_work_that_is_dropped_are_logged_but_refusals_are_not(caplog):
    class Left:
        async def receive(self):
            return {"type": "http.disconnect"}

    async def fail(error: Exception) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise error

    async def drop(error: Exception) -> None:
        with pytest.raises(ClientDisconnect):
            await bodies.unless_disconnected(Left(), fail(error))
        await asyncio.sleep(0)

    for error, lines in ((Refused(503, "no"), []), (KeyError("stumbled"), ["dropped work failed"])):
        asyncio.run(drop(error))
        gc.collect()  # asyncio logs what was never retrieved when the task goes
        assert [record.message for record in caplog.records] == lines


def test_requests_in_a_row_on_one_connection(service):
    one = b"GET /open HTTP/1.1\r\nHost: a\r\n\r\n"
    assert raw(service, one * 3, b"nonsense\r\n\r\n").count(b'"open"') == 3


SLOW = [
    (b"", b"", b""),
    (b"", b"P", b""),
    (b"GET /open HTTP/1.1\r\n", b"X", b""),
    (post(TOKEN + b"Content-Length: 1000\r\n"), b"", b"HTTP/1.1 408 "),
    (post(TOKEN + b"Content-Length: 1000\r\n"), b"P", b"HTTP/1.1 408 "),
    (b"GET /open HTTP/1.1\r\nHost: a\r\n\r\n", b"", b"HTTP/1.1 200 "),
]


def test_who_is_slow_is_cut_off(service):
    """Send a byte every 0.05 s, so that no timeout of a single read expires."""

    def answer_of(sent: bytes, drip: bytes) -> tuple[bytes, float]:
        began, answer = time.monotonic(), b""
        with connected(service) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            connection.settimeout(0.05)
            while time.monotonic() - began < 10:
                with contextlib.suppress(TimeoutError):
                    if not (read := connection.recv(65536)):
                        break
                    answer += read
                connection.sendall(drip)
        return answer, time.monotonic() - began

    with concurrent.futures.ThreadPoolExecutor(len(SLOW)) as pool:
        answers = list(pool.map(lambda case: answer_of(*case[:2]), SLOW))
    for (_, _, status), (answer, seconds) in zip(SLOW, answers, strict=True):
        assert seconds < 5
        assert answer.startswith(status) if status else answer == b""
    assert answers[3][1] < answers[4][1]  # a silent body is given less time than one that drips


def until(holds, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.01)


def test_connections_are_bounded_and_the_idlest_makes_room(service):
    until(lambda: service.connections == 0)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(service)) for _ in range(20)]
        until(lambda: service.connections == LIMITS.max_connections)
        assert raw(service, post(TOKEN + b"Content-Length: 3\r\n", b"abc")).endswith(b"3")
        idle[0].settimeout(0.2)
        assert idle[0].recv(1) == b""  # cut off before its time
        assert service.connections <= LIMITS.max_connections


def test_a_connection_beyond_the_limit_gets_retry_after(service, registry):
    until(lambda: service.connections == 0)
    request = post(TOKEN + b"Content-Length: 0\r\n", path=b"/count?wait")
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS.max_connections):
            stack.enter_context(connected(service)).sendall(request)
        until(lambda: service.connections == LIMITS.max_connections)
        until(lambda: len(service._server.server_state.tasks) == LIMITS.max_connections)
        assert raw(service, request) == BUSY
    until(lambda: service.connections == 0)  # who leaves is not worked for
    until(lambda: not service._server.server_state.tasks)
    left = registry.get_sample_value("t_requests_total", {"status": "499"})
    assert left == LIMITS.max_connections


def test_requests_are_counted_and_metrics_need_the_token(service, registry):
    before = registry.get_sample_value("t_requests_total", {"status": "200"}) or 0
    raw(service, b"GET /open HTTP/1.0\r\n\r\n")
    get = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    until(
        lambda: (
            f't_requests_total{{status="200"}} {before + 1:.1f}\n'.encode()
            in raw(service, get + TOKEN + b"\r\n")
        )
    )
    assert raw(service, get + b"\r\n").startswith(b"HTTP/1.1 401 ")


def test_memory_is_reserved_and_given_back():
    budget = MemoryBudget(800, small=100)
    with pytest.raises(Refused, match="all the memory"), budget.reserve(701):
        pass
    with budget.reserve(700), budget.reserve(100):  # the last eighth is for small ones
        with pytest.raises(Refused) as refused, budget.reserve(1):
            pass
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
    assert budget.reserved == 0


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(256, -1, [(1152, -1)]), (1024, 1152, [(1152, 1152)]), (1152, 1152, []), (-1, -1, [])],
)
def test_connections_get_enough_open_files(monkeypatch, soft, hard, raised):
    """Start one service of 512 connections, 4 queues of 128 and 128 other files."""
    made = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: made.append(limits))
    allow_open_files("test", [ConnectionLimits(max_connections=512)])
    assert made == raised
    if hard > 0:
        with pytest.raises(UserError, match=r"test: .* need up to 1153 open files, .* allows 1152"):
            allow_open_files("test", [ConnectionLimits(max_connections=513)])


def test_an_address_that_is_not_free(service):
    port = int(service.url.rsplit(":", 1)[1])
    for wrong in (port, 70000):
        with pytest.raises(UserError, match=rf"test: cannot listen on 127.0.0.1:{wrong}: "):
            Service("test", [], port=wrong)
    with pytest.raises(UserError, match=r"cannot listen on nowhere\.invalid:0"):
        Service("test", [], host="nowhere.invalid")


GET = b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n"
SCRIPT = """
import asyncio, sys
from starlette.responses import JSONResponse
from starlette.routing import Route
from blip3o_jax.serving.connections import ConnectionLimits
from blip3o_jax.serving.service import Service, run_until_signal

async def slow(request):
    print("asked", flush=True)
    await asyncio.sleep(0.3)
    return JSONResponse("done")

async def hang(request):
    await asyncio.sleep(60)

routes = [Route("/slow", slow), Route("/hang", hang, methods=["GET", "POST"])]
service = Service("test", routes, limits=ConnectionLimits(grace_seconds=1))
stopped = run_until_signal([service], lambda: print(service.url, flush=True))
print("stopped by", stopped.name)
"""


def test_a_signal_lets_requests_be_answered():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], text=True, env=dict(os.environ), **pipes
    )
    try:
        address = ("127.0.0.1", int(process.stdout.readline().rsplit(":", 1)[1]))
        with concurrent.futures.ThreadPoolExecutor(3) as pool, contextlib.ExitStack() as stack:
            answers = []
            unread = b"POST /hang HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
            for request in (GET % b"/hang", unread, GET % b"/slow"):
                connection = stack.enter_context(socket.create_connection(address, timeout=20))
                connection.sendall(request)
                answers.append(pool.submit(rest, connection))
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGINT)
            *hung, slow = (answer.result(20) for answer in answers)
        assert slow.endswith(b'"done"')
        assert all(b" 503 " in answer and b"the service is ending" in answer for answer in hung)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and out == "stopped by SIGINT\n"
        assert err == "Cancel 2 running task(s), timeout graceful shutdown exceeded\n"
    finally:
        process.kill()
        process.wait()
