"""Run the client against servers of its own kind, and against ones that lie, fail or do not
exist."""

import collections
import concurrent.futures
import contextlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import ClassVar

import numpy as np
import pytest

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards import http as http_reward
from blip3o_jax.rl.rewards.http import HttpReward, Unreachable
from blip3o_jax.rl.rewards.pool import RewardPool
from blip3o_jax.rl.rewards.reward import Scores
from blip3o_jax.rl.rewards.server import Limits, RewardServer
from tests.rl.rewards.in_process import InProcess, Red


def images(count: int) -> np.ndarray:
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(reward, **options):
    with RewardServer((), scorers=InProcess(reward), **options) as server, server.in_background():
        yield server.url


@pytest.fixture(scope="module")
def good():
    with serving(Red()) as url:
        yield url


@pytest.fixture(scope="module")
def guarded():
    with serving(Red(), token="secret", limits=Limits(max_body=3000)) as url:
        yield url


class Stub(http.server.BaseHTTPRequestHandler):
    """Answer a path /NAME/... with (status, body, headers) of `answers` under NAME, and count the
    requests."""

    answers: ClassVar[dict] = {}
    asked: ClassVar[collections.Counter] = collections.Counter()

    def do_POST(self):
        name = self.path.split("/")[1]
        self.asked[name] += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body, headers = self.answers[name]
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *unused):
        pass


@pytest.fixture(scope="module")
def stubs():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def answering(stubs):
    """Make a server that always answers the same: (url, function that returns the number of
    requests)."""

    def make(status: int, body: bytes, headers=None):
        name = str(len(Stub.answers))
        Stub.answers[name] = status, body, headers or {}
        return f"{stubs}/{name}", lambda: Stub.asked[name]

    return make


@contextlib.contextmanager
def sending(*pieces: bytes, pause: float = 0.0, for_ever: bytes = b""):
    """Return the url of a server that reads a request's headers, then sends these bytes, then some
    for ever."""
    over = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                while b"\r\n\r\n" not in connection.recv(65536):
                    pass
                for piece in pieces:
                    connection.sendall(piece)
                while for_ever and not over.wait(pause):
                    connection.sendall(for_ever)
                if not for_ever:
                    connection.shutdown(socket.SHUT_WR)
                over.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            listener.close()
            thread.join(20)


def score(reward: HttpReward, count: int = 1, prompt: str = "red") -> Scores:
    return reward(images(count), [prompt] * count, [{"x": i} for i in range(count)])


def test_scores_come_back_exactly_and_in_order(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    reds = Red(), Red()
    with serving(reds[0], token="secret") as a, serving(reds[1], token="secret") as b:
        reward = http_reward.create(urls=f"{a}, {b}/", token_env="REWARD_TOKEN", batch="4")
        scores = score(reward, 22)
    assert scores.total_B.dtype == scores.parts["red/third"].dtype == np.float32
    np.testing.assert_array_equal(scores.total_B, np.arange(22))
    np.testing.assert_array_equal(scores.parts["red/third"], (np.arange(22) / 3).astype(np.float32))
    assert sorted(red.images for red in reds) == [10, 12]  # six requests, in turn


class Clock:
    """Replace the client's time, which passes only where it sleeps or a test advances it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(http_reward, "time", clock)
    return clock


def test_a_dead_server_is_routed_around_and_asked_again_later(clock):
    red, port = Red(), free_port()
    with serving(red) as alive:
        dead = f"http://127.0.0.1:{port}"
        reward = HttpReward([dead, alive], probe=5.0)
        for count in range(1, 5):
            np.testing.assert_array_equal(score(reward).total_B, [0])
            assert red.images == count
        assert reward._failures[dead] == 1  # left out after its first failure
        back = Red()
        with serving(back, port=port):
            for now, images in ((4.9, 0), (5.1, 2)):
                clock.now = now
                for _ in range(4):
                    score(reward)
                assert back.images == images
        assert reward._failures[dead] == 0


def test_a_server_that_fails_is_left_out_for_longer_each_time(clock):
    reward = HttpReward(["http://a:1"], probe=1.0)
    for seconds in (1, 2, 4):
        reward._failed("http://a:1")
        assert reward._out_until["http://a:1"] == seconds
    for _ in range(30):
        reward._failed("http://a:1")
    assert reward._out_until["http://a:1"] == http_reward.LONGEST_PROBE


@pytest.mark.parametrize(
    "body",
    [
        b'{"total": [1, 2], "parts": {}}',
        b'{"total": [NaN], "parts": {}}',
        b'{"total": [1e39], "parts": {}}',
        b'{"total": [1' + b"0" * 400 + b'], "parts": {}}',
        b'{"total": ["1"], "parts": {}}',
        b'{"total": [true], "parts": {}}',
        b'{"total": [1], "parts": {"p": []}}',
        b'{"total": [1]}',
        b'{"total": [1], "parts": {"a\\nb": [1]}}',
        b'{"total": [1], "parts": {"' + b"p" * 101 + b'": [1]}}',
        json.dumps({"total": [1], "parts": {str(i): [1] for i in range(65)}}).encode(),
        b"[" * 10_000,
        b"[]",
        b"<html>",
        b" " * (1 << 20),
        b"\xff",
    ],
)
def test_an_answer_that_is_no_score_is_never_one(body, answering, good):
    url, _ = answering(200, body)
    with pytest.raises(Unreachable, match="no server gave scores"):
        score(HttpReward([url]))
    np.testing.assert_array_equal(
        score(HttpReward([url, good])).total_B, [0]
    )  # and another server is asked


@pytest.mark.parametrize(
    ("status", "body", "headers", "line"),
    [
        (500, b'{"error": "broken\\n\\u001b[2J"}', {}, "status 500: broken \\x1b[2J"),
        (500, b'{"error": ' + b"[" * 10_000, {}, "status 500: no reason given"),
        (500, b"\xff", {}, "status 500: no reason given"),
        (302, b"", {"Location": "http://127.0.0.1:1/"}, "status 302: redirects are not followed"),
        (307, b"", {"Location": "/"}, "status 307: redirects are not followed"),
        (408, b"", {}, "status 408: no reason given"),
        (200, b"\x1f\x8b" + bytes(100), {"Content-Encoding": "gzip"}, "UnicodeDecodeError"),
    ],
)
def test_a_failure_goes_to_the_next_server(status, body, headers, line, answering, good):
    failing, asked = answering(status, body, headers)
    with pytest.raises(Unreachable) as unreachable:
        score(HttpReward([failing]))
    assert str(unreachable.value).startswith(
        f"reward http: no server gave scores: {failing}: {line}"
    )
    np.testing.assert_array_equal(score(HttpReward([failing, good])).total_B, [0])
    assert asked() == 2


def test_a_refusal_does_not_go_to_the_next_server(answering):
    refusing, asked = answering(422, b'{"error": "no such thing"}')
    other, asked_other = answering(500, b"")
    with pytest.raises(UserError, match=f"{refusing} refused with 422: no such thing"):
        score(HttpReward([refusing, other]))
    assert (asked(), asked_other()) == (1, 0)


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"\0\xff\r\n\r\n"],
        [b"HTTP/1.1 abc\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 1" + b"0" * 5000 + b"\r\n\r\n{}"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"],
        [b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n"],
        [b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n"],
    ],
)
def test_whatever_is_sent_is_a_failure_of_one_line(pieces):
    with sending(*pieces) as url, pytest.raises(Unreachable) as unreachable:
        score(HttpReward([url], timeout=10))
    assert "\n" not in str(unreachable.value)


DRIPS = (
    # What is sent first, and then for ever: a byte at a time keeps a socket's timeout from
    # expiring.
    (b"", b"1"),
    (b"HTTP/1.1 200 OK\r\nA: ", b"1"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n", b"1"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1"),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
)


def test_an_answer_without_end_is_read_no_further_than_scores_may_go():
    longer = pytest.raises(Unreachable, match="the answer is longer than")
    with sending(b"HTTP/1.1 200 OK\r\n\r\n", for_ever=b" " * 65536) as url, longer:
        score(HttpReward([url], timeout=20))


def test_an_answer_that_drips_is_cut_off():
    def outcome(drip: tuple[bytes, bytes]) -> str:
        first, for_ever = drip
        with sending(first, pause=0.02, for_ever=for_ever) as url:
            with pytest.raises(Unreachable) as unreachable:
                score(HttpReward([url], timeout=0.3))
            return str(unreachable.value)

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(DRIPS)) as pool:
        for line in pool.map(outcome, DRIPS):
            assert "no complete answer within 0.3 s" in line
    assert time.monotonic() - began < 5


def test_refusals_of_the_real_server_name_their_reason(guarded):
    with pytest.raises(UserError, match="refused with 401"):
        score(HttpReward([guarded], token="wrong"))
    with pytest.raises(UserError, match="refused with 422: cannot judge this"):
        score(HttpReward([guarded], token="secret"), prompt="refuse")
    with pytest.raises(UserError, match="refused with 413: the body is longer than 3000 bytes"):
        score(HttpReward([guarded], token="secret", batch=200), 200)
    with pytest.raises(Unreachable, match="the reward failed: red: RuntimeError: out of paint"):
        score(HttpReward([guarded], token="secret"), prompt="fail")


def test_a_body_refused_while_it_is_sent_is_a_refusal_too():
    """Send sixteen megabytes, which do not fit into the socket's buffers; the server answers by the
    headers."""
    answer = b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno"

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            while b"\r\n\r\n" not in connection.recv(65536):
                pass
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=refuse)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        exchange = http_reward._exchange(url, "POST", "/score", bytes(1 << 24), "", 20.0, 100)
        assert exchange[:2] == (413, b"no")
        server.join()


def test_a_busy_server_is_waited_for(clock, answering, good):
    busy, asked = answering(503, b'{"error": "busy"}', {"Retry-After": "7"})
    with pytest.raises(Unreachable, match="is busy"):
        score(HttpReward([busy], timeout=20))
    assert asked() == 3 and clock.now == 14  # a third wait would end after the timeout
    np.testing.assert_array_equal(score(HttpReward([busy, good])).total_B, [0])
    assert clock.now == 14


@pytest.mark.parametrize(
    "said", ["0", "-1", "1000000000", "9" * 500, "\xb2", "nan", "Wed, 21 Oct 2099 07:28:00 GMT", ""]
)
@pytest.mark.parametrize("status", [429, 503])
def test_how_often_a_busy_server_is_asked_is_bounded_whatever_it_says(
    clock, answering, said, status
):
    busy, asked = answering(status, b"", {"Retry-After": said})
    with pytest.raises(Unreachable, match="is busy"):
        score(HttpReward([busy], timeout=60))
    assert clock.now <= 60 and 1 < asked() < 25


def test_a_busy_server_is_waited_for_rather_than_one_that_is_left_out(clock, answering):
    busy, _ = answering(503, b"", {"Retry-After": "7"})
    failing, asked = answering(500, b"")
    with pytest.raises(Unreachable):
        score(HttpReward([failing, busy], timeout=20, probe=100))
    assert asked() == 1


def test_a_server_that_hangs_leaves_time_for_the_next(good):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        reward = HttpReward([hanging, good], timeout=0.8)
        np.testing.assert_array_equal(score(reward).total_B, [0])
        assert reward._failures == {hanging: 1, good: 0}


def test_servers_with_different_rewards_are_an_error(answering):
    one, _ = answering(200, json.dumps({"total": [1], "parts": {"a": [1]}}).encode())
    other, _ = answering(200, json.dumps({"total": [1], "parts": {}}).encode())
    with pytest.raises(UserError, match="same reward"):
        score(HttpReward([one, other], batch=1), 2)


def test_a_wrong_token_or_url_is_reported_before_a_run_starts(answering, good, guarded):
    dead = f"http://127.0.0.1:{free_port()}"
    elsewhere, _ = answering(200, b"<html>")
    broken, _ = answering(500, b'{"error": "broken"}')
    for urls, token, line in (
        ([guarded], "wrong", "does not take the token: .*; set token_env"),
        ([good, guarded], "", "does not take the token"),
        ([dead], "", f"no server answers: {dead}: ConnectionRefusedError"),
        ([broken], "", "no server answers: .*: status 500: broken"),
        ([elsewhere], "", r"is no reward server \(status 200\)"),
        ([good + "/more"], "", r"is no reward server \(status 404\)"),
    ):
        with pytest.raises(UserError, match=line):
            HttpReward(urls, token).check("red", {})
    HttpReward([dead, guarded], "secret").check("red", {})  # one that is down is done without


def test_the_pool_refuses_a_timeout_that_it_would_not_wait_for():
    reward = RewardConfig("http", options=(("urls", "http://a:1"), ("timeout", "60")))
    with pytest.raises(
        UserError, match=r"reward http: timeout=60 must be less than rl\.timeout=60"
    ):
        RewardPool((reward,), timeout=60)


def test_metadata_that_json_cannot_hold_is_refused_when_it_is_loaded(good):
    reward = HttpReward([good])
    reward.check("red", {"x": [1, None]})
    for bad in ({"x": {1, 2}}, {"x": float("nan")}):
        with pytest.raises(UserError, match="JSON cannot hold the metadata of prompt 'red'"):
            reward.check("red", bad)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"urls": ""}, "'' is not like http://HOST:PORT"),
        ({"urls": "http://a:1,b:2"}, "'b:2' is not like"),
        ({"urls": "ftp://a"}, "'ftp://a' is not like"),
        ({"urls": "http://a:port"}, "'http://a:port' is not like"),
        ({"urls": "http://a b"}, "'http://a b' is not like"),
        ({"urls": "http://\u00fc"}, "is not like"),
        ({"urls": "http://" + "a" * 70}, "is not like"),
        ({"urls": "http://me:secret@a"}, "is not like"),
        ({"urls": "http://[::1"}, "is not like"),
        ({"urls": "http://a", "token": "\u00e9\n"}, "a token is made of"),
        ({"urls": "http://a", "token": "x", "token_env": "Y"}, "exclude each other"),
        ({"urls": "http://a", "token_env": "NO_TOKEN_HERE"}, "token_env=NO_TOKEN_HERE"),
        ({"urls": "http://a", "batch": "0"}, "batch='0' must be a whole number"),
        ({"urls": "http://a", "timeout": "soon"}, "timeout='soon' must be a number"),
    ],
)
def test_options_are_checked(options, message):
    assert "NO_TOKEN_HERE" not in os.environ
    with pytest.raises(UserError, match=message):
        http_reward.create(**options)


ROOT = pathlib.Path(__file__).parents[3]


@contextlib.contextmanager
def served(count: int):
    """Return [(process, url), ...] of reward servers as users run them."""
    command = [sys.executable, "-m", "blip3o_jax", "rl", "serve-rewards", "--port=0"]
    command.append("--reward=python:tests.rl.rewards.scorers.brightness")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        yield [(process, process.stdout.readline().split()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def scored_by(url: str) -> int:
    """Return the number of images that a server has scored, by its own count."""
    with urllib.request.urlopen(url + "/metrics", timeout=20) as answer:
        lines = dict(
            line.rsplit(" ", 1)
            for line in answer.read().decode().splitlines()
            if not line.startswith("#")
        )
    return int(float(lines["blip3o_reward_images_total"]))


@pytest.mark.slow
def test_servers_share_a_pools_images_and_one_that_is_killed_is_done_without():
    """Use real processes on both sides."""
    with served(3) as servers:
        urls = [url for _, url in servers]
        reward = RewardConfig(
            "http", options=(("urls", ",".join(urls)), ("batch", "1"), ("timeout", "10"))
        )
        with RewardPool((reward,), workers=2) as pool:
            for round_ in range(3):
                result = pool.submit(images(24), ["a"] * 24, [{}] * 24).result()
                assert result.reasons == {}
                np.testing.assert_allclose(result.total_B, np.arange(24) / 255, rtol=1e-6)
                if round_ == 0:
                    assert min(map(scored_by, urls)) >= 4 and sum(map(scored_by, urls)) == 24
                    servers[0][0].kill()
                    servers[0][0].wait()
        assert min(map(scored_by, urls[1:])) >= 12 and sum(map(scored_by, urls[1:])) >= 48


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: asked.wait(10))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        http_reward._exchange("http://scores.example:1", "GET", "/health", None, "", 0.2, 100)
    asked.set()
    assert time.monotonic() - began < 5
