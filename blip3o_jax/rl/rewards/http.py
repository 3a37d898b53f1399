"""A reward that is computed elsewhere: the client of `blip3o rl serve-rewards` (`server`; bodies in `wire`).

Requests go to the servers in turn. One that cannot be reached, does not answer in time or fails (5xx) is left out for a while,
twice as long each time, and the request goes to the next; one that is busy (503) is asked again once all have been asked. A
request that a server refuses (4xx) would be refused by the others too: that is a UserError with the server's line.

Shape suffixes: B images, H height, W width, C colour channels.
"""

import concurrent.futures
import http.client
import itertools
import json
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards import wire
from blip3o_jax.rl.rewards.options import number
from blip3o_jax.rl.rewards.reward import Reward, Scores

PROBE = 5.0  # seconds for which a server is left out after a failure
LONGEST_PROBE = 120.0
MAX_ANSWER = 16 << 20  # bytes


class Unreachable(Exception):
    """No server gave scores: one line that says why, server by server."""


class _Busy(Exception):
    def __init__(self, seconds: float):
        super().__init__("busy")
        self.seconds = seconds


def create(urls: str, token: str = "", token_env: str = "", timeout: str = "60", batch: str = "16") -> "HttpReward":
    """The registry's factory. `urls`: "http://a:8000,http://b:8000". `token_env`: name of the environment variable that holds
    the token, which then stands in no config and no log; `token` is the token itself. `timeout`: seconds for an answer.
    `batch`: images of a request."""
    if token and token_env:
        raise UserError("reward http: token and token_env exclude each other: leave one of them out")
    return HttpReward(
        tuple(_base(url.strip()) for url in urls.split(",")),
        wire.read_token(token_env) if token_env else token,
        number("http", "timeout", timeout, float, 0.001, 86400),
        number("http", "batch", batch, int, 1, 4096),
    )


def _base(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # the port is no number
        good = False
    if not good or parts.query or parts.fragment:
        raise UserError(f"reward http: urls: {url!r} is not like http://HOST:PORT (several are separated by commas)")
    return url.rstrip("/")


class HttpReward(Reward):
    """Parts are the server's."""

    def __init__(self, urls: Sequence[str], token: str = "", timeout: float = 60.0, batch: int = 16, probe: float = PROBE):
        self._urls, self._token, self._timeout, self._batch, self._probe = tuple(urls), token, timeout, batch, probe
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._failures = dict.fromkeys(self._urls, 0)  # in a row
        self._out_until = dict.fromkeys(self._urls, 0.0)
        self._threads = concurrent.futures.ThreadPoolExecutor(len(self._urls))

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """That the request can be written; what the reward itself makes of it is for the server to say."""
        try:
            json.dumps(dict(metadata), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward http: JSON cannot hold the metadata of prompt {prompt[:80]!r}: {error}") from None

    def __call__(self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As many requests at once as there are servers. Raises UserError (a server refused) or Unreachable."""
        chunks = [slice(start, start + self._batch) for start in range(0, len(prompts), self._batch)]
        found = list(self._threads.map(lambda c: self._score(images_BHWC[c], prompts[c], metadata[c]), chunks))
        names = {tuple(sorted(scores.parts)) for scores in found}
        if len(names) > 1:
            raise UserError(f"reward http: the servers of {', '.join(self._urls)} have different parts: serve the same reward")
        parts = {name: np.concatenate([scores.parts[name] for scores in found]) for name in found[0].parts}
        return Scores(np.concatenate([scores.total_B for scores in found]), parts)

    def _score(self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        body = wire.encode_request(images_BHWC, prompts, metadata)
        end = time.monotonic() + self._timeout
        while True:
            reasons, wait = [], None
            for url in self._order():
                if wait is not None and self._out_until[url] > time.monotonic():
                    break  # rather wait for a busy one than for one that is left out
                try:
                    scores = self._ask(url, body, len(prompts))
                except UserError:
                    raise
                except _Busy as busy:
                    wait = min(busy.seconds, wait or busy.seconds)
                    reasons.append(f"{url} is busy")
                except (OSError, http.client.HTTPException, ValueError) as error:
                    self._failed(url)
                    reasons.append(f"{url}: {type(error).__name__}: {error}")
                else:
                    self._failures[url] = 0
                    return scores
            if wait is None or time.monotonic() + wait > end:
                raise Unreachable("reward http: no server gave scores: " + "; ".join(reasons))
            time.sleep(wait)

    def _order(self) -> list[str]:
        """In turn those that are not left out; then the others, since any answer is better than none."""
        with self._lock:
            turn, now = next(self._turn) % len(self._urls), time.monotonic()
        urls = self._urls[turn:] + self._urls[:turn]
        return sorted(urls, key=lambda url: self._out_until[url] > now)

    def _failed(self, url: str) -> None:
        with self._lock:
            seconds = min(self._probe * 2 ** min(self._failures[url], 16), LONGEST_PROBE)
            self._failures[url] += 1
            self._out_until[url] = time.monotonic() + seconds

    def _ask(self, url: str, body: bytes, count: int) -> Scores:
        """One server's scores. OSError, HTTPException or ValueError where it failed, _Busy, or UserError where it refused."""
        status, answer, retry_after = self._post(url, body)
        if status == 200:
            return wire.decode_scores(answer, count)
        line = _error_line(answer)
        if status == 503:
            raise _Busy(float(retry_after) if retry_after.isdigit() else 1.0)
        if 400 <= status < 500:
            raise UserError(f"reward http: {url} refused with {status}: {line}")
        raise http.client.HTTPException(f"status {status}: {line}")

    def _post(self, url: str, body: bytes) -> tuple[int, bytes, str]:
        """Status, body and Retry-After of the answer."""
        parts = urllib.parse.urlsplit(url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=self._timeout)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._token}"} if self._token else {})
        try:
            try:
                connection.request("POST", f"{parts.path}/score", body, headers)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                # It may have refused by the headers alone, and its answer lie ready.
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER + 1)
            if len(answer) > MAX_ANSWER:
                raise ValueError(f"the answer is longer than {MAX_ANSWER} bytes")
            return response.status, answer, response.headers.get("Retry-After", "")
        finally:
            connection.close()


def _error_line(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])[:300]
    except (ValueError, TypeError, KeyError):
        return "no reason given"
