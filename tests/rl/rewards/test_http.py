"""The client against servers of its own kind, and against ones that lie, fail or are not there."""

import collections
import contextlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards import http as http_reward
from blip3o_jax.rl.rewards.http import HttpReward, Unreachable
from blip3o_jax.rl.rewards.pool import RewardPool
from blip3o_jax.rl.rewards.reward import Reward, Scores
from blip3o_jax.rl.rewards.server import Limits, RewardServer


class Red(Reward):
    def __init__(self):
        self.images = 0

    def check(self, prompt, metadata):
        if prompt == "refuse":
            raise UserError("cannot judge this")

    def __call__(self, images_BHWC, prompts, metadata):
        self.images += len(prompts)
        if "fail" in prompts:
            raise RuntimeError("out of paint")
        third_B = np.array([m["x"] / 3 for m in metadata], np.float32)
        return Scores(images_BHWC[..., 0].mean(axis=(1, 2), dtype=np.float32), {"third": third_B})


def images(count: int) -> np.ndarray:
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def answering(status: int, body: bytes, headers=None):
    """(url, how often it was asked) of a server that always answers the same."""
    asked = collections.Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked["times"] += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *unused):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def score(reward: HttpReward, count: int = 1, prompt: str = "red") -> Scores:
    return reward(images(count), [prompt] * count, [{"x": i} for i in range(count)])


def test_scores_come_back_exactly_and_in_order(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    reds = Red(), Red()
    with RewardServer(reds[0], token="secret") as a, RewardServer(reds[1], token="secret") as b:
        reward = http_reward.create(urls=f"{a.url}, {b.url}/", token_env="REWARD_TOKEN", batch="4")
        scores = score(reward, 22)
    assert scores.total_B.dtype == scores.parts["third"].dtype == np.float32
    np.testing.assert_array_equal(scores.total_B, np.arange(22))
    np.testing.assert_array_equal(scores.parts["third"], (np.arange(22) / 3).astype(np.float32))
    assert sorted(red.images for red in reds) == [10, 12]  # six requests, in turn


class Clock:
    """The client's time, which passes only where it sleeps or a test says so."""

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
    with RewardServer(red) as alive:
        dead = f"http://127.0.0.1:{port}"
        reward = HttpReward([dead, alive.url], probe=5.0)
        for count in range(1, 5):
            np.testing.assert_array_equal(score(reward).total_B, [0])
            assert red.images == count
        assert reward._failures[dead] == 1  # left out after its first failure
        back = Red()
        with RewardServer(back, port=port):
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
        b"[]",
        b"<html>",
        b"\xff",
    ],
)
def test_an_answer_that_is_no_score_is_never_one(body):
    with answering(200, body) as (url, _):
        with pytest.raises(Unreachable, match="no server gave scores"):
            score(HttpReward([url]))
        with RewardServer(Red()) as good:  # and another server is asked
            np.testing.assert_array_equal(score(HttpReward([url, good.url])).total_B, [0])


def test_a_failure_goes_to_the_next_server_and_a_refusal_does_not():
    with answering(500, b'{"error": "broken"}') as (failing, _), RewardServer(Red()) as good:
        np.testing.assert_array_equal(score(HttpReward([failing, good.url])).total_B, [0])
        with pytest.raises(Unreachable, match="status 500: broken"):
            score(HttpReward([failing]))
    refusal, red = b'{"error": "no such thing"}', Red()
    with answering(422, refusal) as (refusing, asked), RewardServer(red) as good:
        with pytest.raises(UserError, match=f"{refusing} refused with 422: no such thing"):
            score(HttpReward([refusing, good.url]))
        assert asked["times"] == 1 and red.images == 0


def test_refusals_of_the_real_server_name_their_reason():
    with RewardServer(Red(), token="secret", limits=Limits(max_body=3000)) as server:
        with pytest.raises(UserError, match="refused with 401"):
            score(HttpReward([server.url], token="wrong"))
        with pytest.raises(UserError, match="refused with 422: cannot judge this"):
            score(HttpReward([server.url], token="secret"), prompt="refuse")
        with pytest.raises(UserError, match="refused with 413: the body is longer than 3000 bytes"):
            score(HttpReward([server.url], token="secret", batch=200), 200)
        with pytest.raises(Unreachable, match="the reward failed: RuntimeError: out of paint"):
            score(HttpReward([server.url], token="secret"), prompt="fail")


def test_a_body_refused_while_it_is_sent_is_a_refusal_too():
    """Eight megabytes do not fit into the socket's buffers; the server answers by the headers and resets the connection."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 512, 512, 3), dtype=np.uint8)
    answer = b'{"error": "much too long"}'

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            while b"\r\n\r\n" not in connection.recv(65536):
                pass
            connection.sendall(b"HTTP/1.1 413 No\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=refuse)
        server.start()
        with pytest.raises(UserError, match="refused with 413: much too long"):
            HttpReward([f"http://127.0.0.1:{listener.getsockname()[1]}"])(noise, [""] * 8, [{}] * 8)
        server.join()


def test_a_busy_server_is_waited_for(clock):
    with answering(503, b'{"error": "busy"}', {"Retry-After": "7"}) as (busy, asked):
        with pytest.raises(Unreachable, match="is busy"):
            score(HttpReward([busy], timeout=20))
        assert asked["times"] == 3 and clock.now == 14  # a third wait would end after the timeout
        with RewardServer(Red()) as good:
            np.testing.assert_array_equal(score(HttpReward([busy, good.url])).total_B, [0])
        assert clock.now == 14


def test_a_busy_server_is_waited_for_rather_than_one_that_is_left_out(clock):
    with answering(503, b"", {"Retry-After": "7"}) as (busy, _), answering(500, b"") as (failing, asked):
        with pytest.raises(Unreachable):
            score(HttpReward([failing, busy], timeout=20, probe=100))
        assert asked["times"] == 1


def test_a_server_that_hangs_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent, RewardServer(Red()) as good:
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        reward = HttpReward([hanging, good.url], timeout=1.5)
        np.testing.assert_array_equal(score(reward).total_B, [0])
        assert reward._failures == {hanging: 1, good.url: 0}


def test_servers_with_different_rewards_are_an_error():
    first = json.dumps({"total": [1], "parts": {"a": [1]}}).encode()
    second = json.dumps({"total": [1], "parts": {}}).encode()
    with answering(200, first) as (one, _), answering(200, second) as (other, _), pytest.raises(UserError, match="same reward"):
        score(HttpReward([one, other], batch=1), 2)


def test_metadata_that_json_cannot_hold_is_refused_when_it_is_loaded():
    reward = HttpReward(["http://a:1"])
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
        ({"urls": "http://a", "token": "x", "token_env": "Y"}, "exclude each other"),
        ({"urls": "http://a", "token_env": "NO_TOKEN_HERE"}, "token_env=NO_TOKEN_HERE"),
        ({"urls": "http://a", "batch": "0"}, "batch='0' must be a whole number"),
        ({"urls": "http://a", "timeout": "soon"}, "timeout='soon' must be a number"),
    ],
)
def test_options_are_judged(options, message):
    assert "NO_TOKEN_HERE" not in os.environ
    with pytest.raises(UserError, match=message):
        http_reward.create(**options)


ROOT = pathlib.Path(__file__).parents[3]


@contextlib.contextmanager
def served(count: int):
    """[(process, url), ...] of reward servers as they are run."""
    command = [sys.executable, "-m", "blip3o_jax", "rl", "serve-rewards", "--port=0"]
    command.append("--reward=python:tests.rl.rewards.scorers.brightness")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        yield [(process, process.stdout.readline().split()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def scored_by(url: str) -> int:
    """Images that a server has scored, by its own count."""
    with urllib.request.urlopen(url + "/metrics", timeout=20) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    return int(lines["blip3o_reward_images_total"])


@pytest.mark.slow
def test_servers_share_a_pools_images_and_one_that_is_killed_is_done_without():
    """Real processes on both sides."""
    with served(3) as servers:
        urls = [url for _, url in servers]
        reward = RewardConfig("http", options=(("urls", ",".join(urls)), ("batch", "1"), ("timeout", "10")))
        with RewardPool((reward,), workers=2) as pool:
            for round_ in range(3):
                judged = pool.submit(images(24), ["a"] * 24, [{}] * 24).result()
                assert judged.reasons == {}
                np.testing.assert_allclose(judged.total_B, np.arange(24) / 255, rtol=1e-6)
                if round_ == 0:
                    assert min(map(scored_by, urls)) >= 4 and sum(map(scored_by, urls)) == 24
                    servers[0][0].kill()
                    servers[0][0].wait()
        assert min(map(scored_by, urls[1:])) >= 12 and sum(map(scored_by, urls[1:])) >= 48
