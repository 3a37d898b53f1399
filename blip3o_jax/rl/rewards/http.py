"""Compute a reward on other machines: the client of `blip3o rl serve-rewards`.

server.py is its server, wire.py defines the bodies. Requests go to the servers in turn. A server
that cannot be reached, does not answer in time or fails (5xx, a redirect, an answer without scores)
is skipped for a period that doubles each time, and the request goes to the next one; a busy server
(429, 503) is tried again once all have been tried. A request that one server refuses (other 4xx)
would be refused by the others too: it raises UserError with the server's message.

A request always ends after `timeout` seconds with scores, Unreachable or UserError, in one line.
The standard library's HTTP client is used, under a deadline (`_Deadline`): its timeouts, like those
of httpx, bound a single read, and httpx is slower to import in the processes of the pool.

Shape suffixes: B images, H height, W width, C colour channels.
"""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.config.errors import escaped, type_and_line
from blip3o_jax.rl.rewards import wire
from blip3o_jax.rl.rewards.options import number
from blip3o_jax.rl.rewards.reward import Reward, Scores

PROBE = 5.0  # seconds for which a server is left out after a failure
LONGEST_PROBE = 120.0
SHORTEST_WAIT = 0.2  # seconds, at least, until a busy server is tried again
LONGEST_WAIT = 30.0
TIMEOUT = "45"  # less than rl.timeout, after which the pool ends this process
TRY_SECONDS = 10.0  # for which a server is tried before a run starts
LINE = 300  # characters of a server's reason


class Unreachable(Exception):
    """Report that no server gave scores: one line with the reason of each server."""


class _BadAnswer(Exception):
    """Report that a server's answer holds no scores; the message is one line with the reason."""


class _Busy(Exception):
    def __init__(self, seconds: float):
        super().__init__("busy")
        self.seconds = seconds


def create(
    urls: str, token: str = "", token_env: str = "", timeout: str = TIMEOUT, batch: str = "16"
) -> "HttpReward":
    """Make the reward for the registry. `urls`: "http://a:8000,http://b:8000". `token_env`: name of
    the environment variable that holds the token, which then stands in no config and no log;
    `token` is the token itself. `timeout`: seconds for a request's scores, all tries at all servers
    together. `batch`: images of a request."""
    if token and token_env:
        raise UserError(
            "reward http: token and token_env exclude each other: leave one of them out"
        )
    wire.check_token("reward http: token", token)
    return HttpReward(
        tuple(_base(url.strip()) for url in urls.split(",")),
        wire.read_token(token_env) if token_env else token,
        number("http", "timeout", timeout, float, 0.001, 86400),
        number("http", "batch", batch, int, 1, 1024),
    )


def check_timeout(reward: RewardConfig, seconds: float) -> None:
    """Raise UserError unless the reward http gives up before the `seconds` after which the pool
    ends its process."""
    if reward.name == "http":
        timeout = number(
            "http", "timeout", dict(reward.options).get("timeout", TIMEOUT), float, 0.001, 86400
        )
        if timeout >= seconds:
            raise UserError(
                f"reward http: timeout={timeout:g} must be less than rl.timeout={seconds:g}, which "
                "ends the process that waits"
            )


def _base(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        good = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
        parts.hostname and parts.hostname.encode("idna")
    except (ValueError, UnicodeError):  # the port is no number, the host no name
        good = False
    plain = url.isascii() and url.isprintable() and " " not in url
    if not good or not plain or parts.query or parts.fragment or parts.username is not None:
        raise UserError(
            f"reward http: urls: {url!r} is not like http://HOST:PORT (several are separated by "
            "commas)"
        )
    return url.rstrip("/")


class HttpReward(Reward):
    """Request scores from servers; its parts are those of the server."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str = "",
        timeout: float = 60.0,
        batch: int = 16,
        probe: float = PROBE,
    ):
        self._urls = tuple(urls)
        self._token = token
        self._timeout = timeout
        self._batch = batch
        self._probe = probe
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._failures = dict.fromkeys(self._urls, 0)  # in a row
        self._out_until = dict.fromkeys(self._urls, 0.0)
        self._tried = False
        # A thread for each server: requests wait for the network.
        self._threads = concurrent.futures.ThreadPoolExecutor(len(self._urls))

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise UserError for a request that cannot be written, and the first time where no server
        is there or one does not take the token. What the reward itself makes of a prompt is for the
        server to say."""
        if not self._tried:
            self._try_servers()
            self._tried = True
        try:
            json.dumps(dict(metadata), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"reward http: JSON cannot hold the metadata of prompt {prompt[:80]!r}: {error}"
            ) from None

    def _try_servers(self) -> None:
        """Check every server; one that cannot be reached is skipped, as long as there is
        another."""
        found = list(self._threads.map(self._try_server, self._urls))
        reasons = [reason for reason in found if reason is not None]
        if len(reasons) == len(found):
            raise UserError(f"reward http: no server answers: {'; '.join(reasons)}")

    def _try_server(self, url: str) -> str | None:
        """Return why a server cannot be asked now. UserError for a wrong token, and for what is no
        reward server."""
        try:
            status, answer, _ = _exchange(
                url, "GET", "/info", None, self._token, min(TRY_SECONDS, self._timeout), 1 << 16
            )
        except FAILURES as error:
            return f"{url}: {_described(error)}"
        if status == 401:
            raise UserError(
                f"reward http: {url} does not take the token: {_error_line(answer)}; set token_env"
            )
        if status >= 500:
            return f"{url}: status {status}: {_error_line(answer)}"
        with contextlib.suppress(ValueError, RecursionError):
            if status == 200 and "rewards" in json.loads(answer.decode("utf-8")):
                return None
        raise UserError(
            f"reward http: {url} is no reward server (status {status}): is the URL right?"
        )

    def __call__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """Send as many requests at once as there are servers. Raises UserError (a server refused)
        or Unreachable."""
        chunks = [
            slice(start, start + self._batch) for start in range(0, len(prompts), self._batch)
        ]

        def score(chunk: slice) -> Scores:
            return self._score(images_BHWC[chunk], prompts[chunk], metadata[chunk])

        found = list(self._threads.map(score, chunks))
        names = {tuple(sorted(scores.parts)) for scores in found}
        if len(names) > 1:
            raise UserError(
                f"reward http: the servers of {', '.join(self._urls)} have different parts: serve "
                "the same reward"
            )
        parts = {
            name: np.concatenate([scores.parts[name] for scores in found])
            for name in found[0].parts
        }
        return Scores(np.concatenate([scores.total_B for scores in found]), parts)

    def _score(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        body = wire.encode_request(images_BHWC, prompts, metadata)
        end = time.monotonic() + self._timeout
        for attempt in itertools.count():
            reasons, wait = [], None
            urls = self._order()
            for index, url in enumerate(urls):
                if wait is not None and self._out_until[url] > time.monotonic():
                    break  # waiting for a busy server is better than trying one that failed
                # The remaining time is divided, so that a server that hangs leaves some for others.
                seconds = (end - time.monotonic()) / (len(urls) - index)
                if seconds <= 0:
                    break
                try:
                    scores = self._ask(url, body, len(prompts), seconds)
                except UserError:  # a refusal, not one of FAILURES, although a ValueError
                    raise
                except _Busy as busy:
                    wait = min(busy.seconds, wait or busy.seconds)
                    reasons.append(f"{url} is busy")
                except FAILURES as error:
                    self._failed(url)
                    reasons.append(f"{url}: {_described(error)}")
                else:
                    self._failures[url] = 0
                    return scores
            # Exponential backoff for a server that stays busy.
            pause = None if wait is None else max(wait, min(SHORTEST_WAIT * 2**attempt, PROBE))
            if pause is None or time.monotonic() + pause >= end:
                raise Unreachable("reward http: no server gave scores: " + "; ".join(reasons))
            time.sleep(pause)
        raise AssertionError

    def _order(self) -> list[str]:
        """Return the servers in turn, then those that are skipped at present, since any answer is
        better than none."""
        with self._lock:
            turn, now = next(self._turn) % len(self._urls), time.monotonic()
        urls = self._urls[turn:] + self._urls[:turn]
        return sorted(urls, key=lambda url: self._out_until[url] > now)

    def _failed(self, url: str) -> None:
        with self._lock:
            # The exponent is bounded: the float would overflow after a thousand failures.
            seconds = min(self._probe * 2 ** min(self._failures[url], 16), LONGEST_PROBE)
            self._failures[url] += 1
            self._out_until[url] = time.monotonic() + seconds

    def _ask(self, url: str, body: bytes, count: int, seconds: float) -> Scores:
        """Return one server's scores. Raises one of FAILURES where it failed, _Busy, or UserError
        where it refused."""
        largest = wire.largest_answer(count)
        status, answer, retry_after = _exchange(
            url, "POST", "/score", body, self._token, seconds, largest
        )
        if status == 200:
            return wire.decode_scores(answer, count)
        line = _error_line(answer)
        if status in (429, 503):
            raise _Busy(_wait(retry_after))
        if status == 408:
            raise _BadAnswer(f"status 408: {line}")
        if 400 <= status < 500:
            raise UserError(f"reward http: {url} refused with {status}: {line}")
        if 300 <= status < 400:
            raise _BadAnswer(f"status {status}: redirects are not followed")
        raise _BadAnswer(f"status {status}: {line}")


# The exceptions of http.client, ssl, sockets and of parsing a malformed answer.
FAILURES = (
    OSError,
    http.client.HTTPException,
    ValueError,
    RecursionError,
    OverflowError,
    _BadAnswer,
)


class _Deadline:
    """Shut a connection down after `seconds` in total: a socket's timeout restarts at each read."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.passed = False
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._guard: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def left(self) -> float:
        return max(self._end - time.monotonic(), 1e-3)

    def watch(self, connection: socket.socket) -> None:
        """Watch a connected socket, through a duplicate: TLS puts another object in its place."""
        with self._lock:
            self._guard = connection.dup()
            passed = self.passed
        if passed:
            raise TimeoutError

    def _expire(self) -> None:
        with self._lock:
            self.passed = True
            if self._guard is not None:
                with contextlib.suppress(OSError):
                    self._guard.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._guard is not None:
                self._guard.close()
                self._guard = None


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[_Deadline]:
    """Raise TimeoutError in place of any error after the deadline."""
    deadline = _Deadline(seconds)
    try:
        yield deadline
    except FAILURES:
        if not deadline.passed:
            raise
    finally:
        deadline.close()
    if deadline.passed:
        raise TimeoutError(f"no complete answer within {seconds:.3g} s")


def _exchange(
    url: str, method: str, path: str, body: bytes | None, token: str, seconds: float, largest: int
) -> tuple[int, bytes, str]:
    """Return status, body and Retry-After of the answer, which has `seconds` from the connection to
    its end and `largest` bytes. Raises one of FAILURES."""
    parts = urllib.parse.urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    with _deadline(seconds) as deadline:
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=deadline.left())

        # Called before TLS is begun.
        connection._create_connection = lambda address, *unused: _connected(address, deadline)
        headers = {"Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            try:
                connection.request(method, f"{parts.path}{path}", body, headers)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                # The server may have refused after the headers, with its answer ready to read.
            response = connection.getresponse()
            # One byte more than allowed shows that there is more.
            answer = response.read(largest + 1)
            if len(answer) > largest:
                raise _BadAnswer(f"the answer is longer than {largest} bytes")
            return response.status, answer, response.headers.get("Retry-After", "")
        finally:
            connection.close()


def _connected(address: tuple[str, int], deadline: _Deadline) -> socket.socket:
    """Return a connection to the first of a host's addresses that accepts one."""
    host, port = address
    found = _addresses(host, port, deadline)
    for index, (*_, numeric) in enumerate(found):
        try:
            connected = socket.create_connection(numeric[:2], deadline.left())
        except OSError:
            if deadline.passed or index == len(found) - 1:
                raise
        else:
            deadline.watch(connected)
            return connected
    raise OSError(f"{host} has no address")


def _addresses(host: str, port: int, deadline: _Deadline) -> list[Any]:
    """Return the result of `socket.getaddrinfo`, within the deadline.

    `getaddrinfo` has no timeout: with a name server that does not answer, it blocks for as long as
    the system's resolver retries.
    """
    found: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()

    def ask() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    try:
        return found.result(deadline.left())
    except TimeoutError:
        raise TimeoutError(
            f"the address of {host} was not found within {deadline.seconds:.3g} s"
        ) from None


def _wait(retry_after: str) -> float:
    """Return the seconds of a Retry-After header, within bounds; 1 without a valid header."""
    text = retry_after.strip()
    if not text.isdigit() or not text.isascii():
        return 1.0
    return min(max(float(text[:10]), SHORTEST_WAIT), LONGEST_WAIT)


def _error_line(answer: bytes) -> str:
    try:
        return _clean(json.loads(answer.decode("utf-8"))["error"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return "no reason given"


def _described(error: BaseException) -> str:
    return _clean(error if isinstance(error, (_BadAnswer, TimeoutError)) else type_and_line(error))


def _clean(text: Any) -> str:
    """Return a stranger's text as one line that a terminal can be shown."""
    line = " ".join(str(text)[: 2 * LINE].split())
    return escaped(line)[:LINE]
