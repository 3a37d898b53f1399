"""`blip3o rl serve-rewards`: a reward behind HTTP, for rollouts on other machines (the reward `http` is its client).

    POST /score     images to scores (`wire`); needs the token, if there is one
    GET  /health    {"status": "ok"}
    GET  /metrics   Prometheus' text format

What a stranger can send costs little: a request is refused by its headers before its body is read (401 token, 404 path, 405
method, 411 no Content-Length, 413 too long, 503 no room), by the headers of its PNGs before they are decoded, and has
`read_seconds` for all it sends, however slowly. Requests at hand are bounded in number and in memory. One thread scores.

Every connection carries one request: there is nothing to be gained from keeping them beside what scoring takes.
"""

import dataclasses
import hmac
import http.client
import http.server
import io
import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards import wire
from blip3o_jax.rl.rewards.batcher import Batcher, Job
from blip3o_jax.rl.rewards.reward import Scores
from blip3o_jax.rl.rewards.server_metrics import Metrics
from blip3o_jax.rl.rewards.wire import Refused

LOOPBACK = ("127.0.0.1", "localhost")
HEADERS = 1 << 17  # bytes before a body
BODY_COPIES = 4  # of a body at the same time: as it came, as text, as JSON's values, as files
SPARE = 32  # connections beside the waiting ones: /health, /metrics, and what is refused
LINGER = 1.0  # seconds in which a refused request may finish sending, so that it gets to read its answer


@dataclasses.dataclass(frozen=True)
class Limits:
    """`max_pixels`: of all images of a request. `max_waiting`: requests at hand, `max_memory`: bytes of all of them."""

    batch: int = 16
    max_body: int = 64 << 20
    max_pixels: int = 1 << 26
    max_waiting: int = 128
    max_memory: int = 4 << 30
    read_seconds: float = 30.0
    score_seconds: float = 600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise UserError(f"serve-rewards: {field.name}={getattr(self, field.name)} must be positive")
        if BODY_COPIES * self.max_body + 3 * self.max_pixels > self.max_memory:
            raise UserError(
                f"serve-rewards: a request of max_body={self.max_body} and max_pixels={self.max_pixels} may take more than "
                f"max_memory={self.max_memory} bytes: lower the first two"
            )


def serve(
    reward: Callable[..., Scores],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token_env: str = "",
    max_body_mb: int = 64,
    max_pixels: int = 1 << 26,
    batch: int = 16,
    max_waiting: int = 128,
    max_memory_mb: int = 4096,
) -> None:
    """Serves `reward` (see rewards/reward.py) until the process is interrupted. `token_env`: name of the environment variable
    that holds the token; without one only this machine is served. UserError for limits that cannot work, a missing token, or
    an address that is not free."""
    token = wire.read_token(token_env) if token_env else ""
    if not token and host not in LOOPBACK:
        raise UserError(f"serve-rewards: --host={host} is open to other machines: name a variable with a token by --token_env")
    limits = Limits(batch, max_body_mb << 20, max_pixels, max_waiting, max_memory_mb << 20)
    with RewardServer(reward, host, port, token, limits) as server:
        print(f"rewards are served at {server.url}", flush=True)
        server.wait()


class RewardServer:
    """A server in threads of this process, from `with` to its end. `port=0` takes a free one; `url` tells which."""

    def __init__(
        self, reward: Callable[..., Scores], host: str = "127.0.0.1", port: int = 0, token: str = "", limits: Limits = Limits()
    ):
        try:
            self._server = _Server((host, port), reward, token, limits)
        except (OSError, OverflowError) as error:  # the latter of a port beyond 65535
            why = getattr(error, "strerror", None) or error
            raise UserError(f"serve-rewards: cannot listen on {host}:{port}: {why}") from error
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    def __enter__(self) -> "RewardServer":
        self._thread.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.batcher.close()

    def wait(self) -> None:
        self._thread.join()


class _Room:
    """What requests at hand may take: so many of them, so many bytes."""

    def __init__(self, requests: int, memory: int):
        self._left = [requests, memory]
        self._lock = threading.Lock()

    def take(self, requests: int, memory: int) -> bool:
        with self._lock:
            fits = self._left[0] >= requests and self._left[1] >= memory
            if fits:
                self._left = [self._left[0] - requests, self._left[1] - memory]
            return fits

    def give(self, requests: int, memory: int) -> None:
        with self._lock:
            self._left = [self._left[0] + requests, self._left[1] + memory]


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], reward: Callable[..., Scores], token: str, limits: Limits):
        super().__init__(address, _Handler)
        self.reward, self.token, self.limits = reward, token, limits
        self.metrics = Metrics()
        self.batcher = Batcher(reward, limits.batch, self.metrics.scored)
        self.room = _Room(limits.max_waiting, limits.max_memory)
        self._connections = threading.BoundedSemaphore(limits.max_waiting + SPARE)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        self.metrics.answered(503, 0.0)
        request.setblocking(False)  # the answer fits into the socket's buffer
        request.send(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logging.debug("a connection from %s broke", client_address, exc_info=True)


class _Reader(io.RawIOBase):
    """A socket's bytes until a deadline, and no more than `left` of them."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection, self._deadline, self.left = connection, time.monotonic() + seconds, HEADERS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.left:
            raise http.client.HTTPException("the headers are too long")
        self._connection.settimeout(max(self._deadline - time.monotonic(), 1e-3))
        read = self._connection.recv_into(memoryview(buffer)[: self.left])
        self.left -= read
        return read


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # so that what is no request at all gets an answer with headers too

    def setup(self) -> None:
        super().setup()
        self.started = time.monotonic()
        self._raw = _Reader(self.connection, self.server.limits.read_seconds)
        self.rfile = io.BufferedReader(self._raw)
        self._unread = False  # there is, or may be, a body that was not read

    def handle(self) -> None:
        self.handle_one_request()

    def do_POST(self) -> None:
        self._unread = True
        try:
            routes: dict[str, tuple[str, Callable[[], None]]] = {
                "/score": ("POST", self._score),
                "/health": ("GET", lambda: self._answer(200, b'{"status": "ok"}')),
                "/metrics": ("GET", self._metrics),
            }
            path = self.path.partition("?")[0]
            if path not in routes:
                raise Refused(404, f"there is no {path[:80]}; there are {', '.join(routes)}")
            method, answer = routes[path]
            if self.command != method:
                raise Refused(405, f"{path} takes {method}")
            answer()
        except Refused as refused:
            self._refuse(refused.status, refused.line)
        except OSError:
            raise  # of the connection
        except Exception:
            logging.exception("a request failed")
            self._refuse(500, "the server failed; its log says why")

    do_GET = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def _metrics(self) -> None:
        text = self.server.metrics.text(waiting=self.server.batcher.waiting())
        self._answer(200, text.encode("ascii"), "text/plain; version=0.0.4; charset=utf-8")

    def _score(self) -> None:
        length = self._judged_length()
        held = [(1, BODY_COPIES * length)]
        self._take(*held[0])
        try:
            request = wire.parse_request(self._body(length), self.server.limits.max_pixels)
            self._take(0, 3 * request.pixels)
            held.append((0, 3 * request.pixels))
            self._check(request)
            images = [wire.decode_image(file, index) for index, file in enumerate(request.files)]
            scores = self._scores(Job(images, request.prompts, request.metadata))
        finally:
            for requests, memory in held:
                self.server.room.give(requests, memory)
        self._answer(200, wire.encode_scores(scores))

    def _judged_length(self) -> int:
        """The body's, if the headers are in order."""
        sent = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if self.server.token and not hmac.compare_digest(sent, f"Bearer {self.server.token}".encode()):
            raise Refused(401, "the header 'Authorization: Bearer TOKEN' is missing or wrong")
        length = self.headers.get("Content-Length")
        if length is None or "Transfer-Encoding" in self.headers:
            raise Refused(411, "send the body in one piece, with its Content-Length")
        if not (length.isascii() and length.isdigit()):
            raise Refused(400, "Content-Length is not a number")
        if len(length) > 15 or int(length) > self.server.limits.max_body:
            raise Refused(413, f"the body is longer than {self.server.limits.max_body} bytes: send fewer images at once")
        return int(length)

    def _take(self, requests: int, memory: int) -> None:
        if not self.server.room.take(requests, memory):
            raise Refused(503, "too many requests are waiting: try again later")

    def _body(self, length: int) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        self._raw.left += length
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refused(408, f"the body did not come within {self.server.limits.read_seconds:g} s") from None
        self._unread = False
        if len(body) < length:
            raise Refused(400, f"the body ended after {len(body)} of {length} bytes")
        return body

    def _check(self, request: wire.Request) -> None:
        try:
            for prompt, metadata in zip(request.prompts, request.metadata, strict=True):
                self.server.reward.check(prompt, metadata)
        except UserError as error:
            raise Refused(422, str(error)) from None

    def _scores(self, job: Job) -> Scores:
        try:
            return self.server.batcher.score(job, self.server.limits.score_seconds)
        except TimeoutError:
            raise Refused(503, f"no scores within {self.server.limits.score_seconds:g} s") from None
        except Exception as error:
            raise Refused(500, f"the reward failed: {type(error).__name__}: {error}"[:300]) from None

    def handle_expect_100(self) -> bool:
        return True  # only once the headers have been judged

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request."""
        self._unread = True
        self._refuse(code, message or explain or http.client.responses[code])

    def _refuse(self, status: int, line: str) -> None:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": line.split()[-1]}, 503: {"Retry-After": "1"}}
        body = json.dumps({"error": " ".join(line.split())}).encode("ascii")
        self._answer(status, body, headers=headers.get(status, {}))
        if self._unread:
            self._linger()

    def _answer(
        self, status: int, body: bytes, kind: str = "application/json", headers: Mapping[str, str] | None = None
    ) -> None:
        self.server.metrics.answered(status, time.monotonic() - self.started)
        self.connection.settimeout(self.server.limits.read_seconds)
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in (fixed | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _linger(self) -> None:
        """Throws away what still comes for a moment: closing at once would reset the connection, and the client might never
        see the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LINGER
        while (left := end - time.monotonic()) > 0:
            self.connection.settimeout(left)
            if not self.connection.recv(1 << 16):
                return

    def version_string(self) -> str:
        return "blip3o"

    def log_message(self, format: str, *args: Any) -> None:
        logging.debug("%s: " + format, self.client_address[0], *args)
