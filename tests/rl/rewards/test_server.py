"""Run the reward server over real sockets: every status, its queue, and scorers that hang or
die."""

import concurrent.futures
import contextlib
import json
import time

import numpy as np
import pytest

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards.server import Limits, RewardServer, serve
from tests.rl.rewards.in_process import InProcess, Red, ask, body, png

LIMITS = Limits(max_body=100_000, max_pixels=10_000)


@contextlib.contextmanager
def serving(reward, limits=LIMITS, count=1, **options):
    """Yield (url, server, scorers)."""
    scorers = InProcess(reward, count)
    with (
        RewardServer((), limits=limits, scorers=scorers, **options) as server,
        server.in_background(),
    ):
        yield server.url, server, scorers
        if isinstance(reward, Red):
            reward.gate.set()


@pytest.fixture(scope="module")
def served():
    red = Red()
    with serving(red, token="secret") as (url, _, scorers):
        yield url, red, scorers


@pytest.fixture(scope="module")
def url(served):
    return served[0]


def until(holds, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.02)


def metrics(url: str) -> dict[str, float]:
    lines = ask(url, None, "/metrics", "GET")[1].splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("blip3o_reward_"): float(value) for name, value in pairs}


def test_scores_and_parts(url):
    status, answer, headers = ask(url, body(png(3), png(200), png(9, (4, 6))))
    assert (status, headers["Content-Type"]) == (200, "application/json")
    tenth = float(np.float32(0.3 / 3))
    assert json.loads(answer) == {
        "total": [3, 200, 9],
        "parts": {"red": [3, 200, 9], "red/third": [tenth] * 3},
    }


def lying(width: int, height: int) -> bytes:
    """Return a PNG with a second header, the one that decoders use."""
    small, large = png(), png(size=(height, width))
    return small[:33] + large[8:33] + small[33:]


@pytest.mark.parametrize(
    ("change", "status", "line"),
    [
        ({"token": "wrong"}, 401, "missing or wrong"),
        ({"token": "", "path": "/info", "method": "GET"}, 401, "missing or wrong"),
        ({"path": "/nothing"}, 404, "there is no /nothing"),
        ({"method": "PUT"}, 405, "/score does not take PUT"),
        ({"data": b'{"prompts": ['}, 400, "the body is not JSON"),
        ({"data": body(png(), lying(60, 60))}, 400, "images[1] must have exactly one IHDR chunk"),
        ({"data": body(png(size=(101, 100)))}, 413, "more than 10000 pixels"),
        ({"data": bytes(100_001)}, 413, "longer than 100000 bytes"),
        (
            {"data": body(png(), png(), prompts=["red", "refuse"])},
            422,
            "cannot judge this (images[1])",
        ),
        (
            {"data": body(png(), prompts=["stumble"])},
            500,
            "the reward failed: KeyError: 'stumbled'",
        ),
        (
            {"data": body(png(), prompts=["fail"])},
            500,
            "the reward failed: red: RuntimeError: out of paint",
        ),
    ],
)
def test_what_is_refused(url, change, status, line):
    got, answer, _ = ask(url, **({"data": body(png())} | change))
    error = json.loads(answer)["error"]
    assert got == status and line in error and "\n" not in error and "Traceback" not in error
    assert ask(url, body(png()))[0] == 200  # and it goes on


def test_the_served_rewards_are_listed_to_requests_with_the_token(url):
    answer = json.loads(ask(url, None, "/info", "GET")[1])
    assert answer == {"rewards": ["red"], "batch": 16, "max_body": 100_000, "max_pixels": 10_000}


def test_health_is_that_of_the_scorers(served, monkeypatch):
    url, _, scorers = served
    monkeypatch.setattr(scorers, "count", 2)
    for up, status, word in ((2, 200, "ok"), (1, 200, "degraded"), (0, 503, "unavailable")):
        monkeypatch.setattr(scorers, "up", up)
        got, answer, _ = ask(url, None, "/health", "GET", token="")
        fields = {"status": word, "scorers": 2, "scorers_ready": up}
        assert (got, json.loads(answer)) == (status, fields)


def test_metrics_have_their_own_port_where_that_is_asked():
    with serving(Red(), token="secret", metrics=("127.0.0.1", 0)) as (url, server, _):
        assert (
            ask(url, body(png(), png()))[0] == 200 and ask(url, None, "/metrics", "GET")[0] == 404
        )
        apart = server.services[1].url
        assert server.described == f"rewards are served at {url}, metrics at {apart}"
        values = metrics(apart)
        assert values["images_total"] == values["scorers_ready"] * 2 == 2 and values["waiting"] == 0
        assert values['http_requests_total{status="200"}'] == 1 and server.scored == 2


def test_requests_beyond_the_limit_get_retry_after():
    red = Red()
    limits = Limits(max_waiting=2)
    with serving(red, limits) as (url, _, _), concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, url, body(png(), prompts=["wait"]))]
        assert red.waiting.acquire(
            timeout=10
        )  # before the second comes, or both would be scored at once
        waiting.append(pool.submit(ask, url, body(png(), prompts=["wait"])))
        until(lambda: metrics(url)["waiting"] == 1)
        status, answer, headers = ask(url, body(png()))
        assert (status, headers["Retry-After"]) == (503, "1") and "try again later" in answer
        assert ask(url, None, "/health", "GET")[0] == 200  # which takes no room
        red.gate.set()
        assert [w.result(20)[0] for w in waiting] == [200, 200]
        for data in (
            b"{",
            body(png()[:50]),
            body(png(), prompts=["fail"]),
            body(png(), prompts=["refuse"]),
        ):
            assert ask(url, data)[0] in (400, 422, 500)
        assert ask(url, body(png()))[0] == 200  # the room was given back by all of them
        assert metrics(url)["reserved_bytes"] == 0


def test_requests_that_would_take_too_much_memory_get_retry_after():
    red = Red()
    limits = Limits(max_body=500_000)
    room = 700_000  # for one
    limits = Limits(max_body=500_000, max_memory=limits.max_memory - limits.room + room)
    large = json.dumps(body(png(), prompts=["wait"])).encode().ljust(450_000)
    with (
        serving(red, limits) as (url, _, _),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(ask, url, large)
        assert red.waiting.acquire(timeout=10)
        assert ask(url, large)[0] == 503
        red.gate.set()
        assert waiting.result(20)[0] == 200
        assert ask(url, large)[0] == 200  # the room was given back


def test_a_client_that_leaves_is_not_scored(served):
    url, red, _ = served
    red.sizes.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, url, body(png(), prompts=["wait"]))
        assert red.waiting.acquire(timeout=10)
        with pytest.raises(TimeoutError):
            ask(url, body(png()), timeout=0.1)
        until(lambda: metrics(url)["waiting"] == 0)
        red.gate.set()
        assert waiting.result(20)[0] == 200
    assert red.sizes == [1]


def test_many_clients_at_once(served):
    url, red, _ = served
    red.sizes.clear()

    def client(index: int) -> bool:
        status, answer, _ = ask(url, body(png(index), png(index + 1)))
        return status == 200 and json.loads(answer)["total"] == [index, index + 1]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert all(pool.map(client, range(24)))
    assert sum(red.sizes) == 24 * 2 and max(red.sizes) <= LIMITS.batch


def test_a_reward_that_takes_too_long():
    red = Red()
    with serving(red, Limits(request_seconds=0.1)) as (url, _, _):
        status, answer, _ = ask(url, body(png(), prompts=["wait"]))
        red.gate.set()
    assert status == 503 and "no scores within 0.1 s" in answer


def obedient(do: str | None = None) -> dict:
    return {**body(png(255)), "metadata": [{"do": do}]}


def test_scorers_that_hang_or_die_are_replaced():
    reward = RewardConfig("python:tests.rl.rewards.scorers.obedient")
    limits = Limits(scorers=1, score_seconds=1.0)  # a busy machine takes 0.3 s for an image
    with RewardServer([reward], limits=limits) as server, server.in_background():
        url = server.url
        status, answer, _ = ask(url, obedient("hang"))
        assert status == 504 and "took too long" in answer
        status, answer, _ = ask(url, None, "/health", "GET")
        assert status == 503 and json.loads(answer)["status"] == "unavailable"
        assert ask(url, obedient())[0] == 200  # it waits for the successor
        assert ask(url, None, "/health", "GET")[0] == 200
        status, answer, _ = ask(url, obedient("crash"))
        assert status == 500 and "ended its process (exit code 3)" in answer
        ends = metrics(url)
    counts = [ends[f'scorer_ends_total{{reason="{reason}"}}'] for reason in ("timeout", "ended")]
    assert counts == [1, 1]


def test_serve_refuses_what_cannot_work(monkeypatch):
    shapes = [RewardConfig("shapes")]
    with pytest.raises(UserError, match="open to other machines"):
        serve(shapes, "0.0.0.0")
    monkeypatch.delenv("NO_TOKEN_HERE", raising=False)
    with pytest.raises(UserError, match="token_env=NO_TOKEN_HERE"):
        serve(shapes, token_env="NO_TOKEN_HERE")
    for wrong in ({"batch": 0}, {"score_seconds": float("nan")}, {"max_pixels": -1}):
        with pytest.raises(UserError, match=rf"{next(iter(wrong))}=.* must be positive"):
            Limits(**wrong)
    with pytest.raises(
        UserError,
        match=r"--max_memory_mb=1024 is too little for --scorers=2, .*: raise it to 2\d\d\d, or",
    ):
        Limits(max_memory=1 << 30)
    with pytest.raises(UserError, match=r"metrics: cannot listen on 127.0.0.1:70000: "):
        serve(shapes, port=0, metrics_port=70000)
