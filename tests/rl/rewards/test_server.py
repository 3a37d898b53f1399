"""The reward server over real sockets: every status, what it refuses to read, and 64 clients at once."""

import base64
import concurrent.futures
import io
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards import server as server_module
from blip3o_jax.rl.rewards.reward import Reward, Scores
from blip3o_jax.rl.rewards.server import Limits, RewardServer, serve


class Red(Reward):
    """The mean red of each image. Fails at the prompt "fail", refuses "refuse", and waits for `gate` at "wait"."""

    def __init__(self):
        self.gate, self.waiting, self.sizes = threading.Event(), threading.Semaphore(0), []

    def check(self, prompt, metadata):
        if prompt == "refuse":
            raise UserError("cannot judge this")
        if prompt == "stumble":
            raise KeyError("stumbled")

    def __call__(self, images_BHWC, prompts, metadata):
        self.sizes.append(len(prompts))
        if "fail" in prompts:
            raise RuntimeError("out of paint\nat line 3")
        if "wait" in prompts:
            self.waiting.release()
            assert self.gate.wait(20)
        return Scores(images_BHWC[..., 0].mean(axis=(1, 2), dtype=np.float32), {"B": np.full(len(prompts), 0.1, np.float32)})


LIMITS = Limits(max_body=100_000, max_pixels=10_000, max_memory=500_000, read_seconds=20.0)


@pytest.fixture
def red():
    return Red()


@pytest.fixture
def served(red):
    with RewardServer(red, token="secret", limits=LIMITS) as server:
        yield server
        red.gate.set()


def png(value: int = 7, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def body(*files: bytes, prompts: list | None = None) -> dict:
    prompts = prompts or ["red"] * len(files)
    return {"prompts": prompts, "metadata": [{}] * len(files), "images": [base64.b64encode(f).decode() for f in files]}


def ask(server, data, path="/score", method="POST", token="secret", headers=None):
    """(status, answer, headers)."""
    data = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(server.url + path, data, method=method)
    for name, value in ({"Authorization": f"Bearer {token}"} | (headers or {})).items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def raw(server, text: str | bytes, wait: float = 10.0) -> bytes:
    """The answer to bytes as they are; they are all that is ever sent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(text if isinstance(text, bytes) else text.encode())
        answer = b""
        while read := connection.recv(65536):
            answer += read
        return answer


def test_scores_and_parts(served):
    status, answer, headers = ask(served, body(png(3), png(200), png(9, (4, 6))))
    assert (status, headers["Content-Type"]) == (200, "application/json")
    tenth = float(np.float32(0.1))
    assert json.loads(answer) == {"total": [3, 200, 9], "parts": {"B": [tenth] * 3}}


@pytest.mark.parametrize(
    "change, status, line",
    [
        ({"token": "wrong"}, 401, "missing or wrong"),
        ({"path": "/nothing"}, 404, "there is no /nothing"),
        ({"method": "PUT"}, 405, "/score takes POST"),
        ({"method": "DELETE", "path": "/health"}, 405, "/health takes GET"),
        ({"data": b'{"prompts": ['}, 400, "the body is not JSON"),
        ({"data": b"\xff\xfe"}, 400, "the body is not JSON"),
        ({"data": b'{"prompts": NaN}'}, 400, "NaN is no JSON number"),
        ({"data": b"[" * 5000}, 400, "the body is not JSON"),
        ({"data": []}, 422, "must be an object with prompts, metadata, images"),
        ({"data": {**body(png()), "more": 1}}, 422, "and nothing else"),
        ({"data": {**body(png()), "prompts": [1]}}, 422, "prompts must be a list of texts"),
        ({"data": {**body(png()), "metadata": ["x"]}}, 422, "metadata must be a list of objects"),
        ({"data": {**body(png()), "prompts": ["a", "b"]}}, 422, "2 prompts, 1 metadata and 1 images"),
        ({"data": body()}, 422, "0 prompts"),
        ({"data": body(png(), prompts=["refuse"])}, 422, "cannot judge this"),
        ({"data": body(png(), prompts=["stumble"])}, 500, "the server failed; its log says why"),
        ({"data": {**body(png()), "images": ["%%%"]}}, 400, "images[0] is not base64"),
        ({"data": body(png(), b"GIF89a" + bytes(40))}, 400, "images[1] is not a PNG"),
        ({"data": body(png()[:50])}, 400, "images[0] is a broken PNG"),
        ({"data": body(png()[:45] + b"\0\0\0\0" + png()[49:])}, 400, "images[0] is a broken PNG"),
        ({"data": body(png(size=(101, 100)))}, 413, "more than 10000 pixels"),
        ({"data": body(*[png(size=(60, 60))] * 3)}, 413, "more than 10000 pixels altogether"),
        ({"data": bytes(100_001)}, 413, "longer than 100000 bytes"),
        ({"data": body(png(), prompts=["fail"])}, 500, "the reward failed: RuntimeError: out of paint at line 3"),
    ],
)
def test_what_is_refused(served, change, status, line):
    got, answer, _ = ask(served, **({"data": body(png())} | change))
    error = json.loads(answer)["error"]
    assert got == status and line in error and "\n" not in error and "Traceback" not in error
    assert ask(served, body(png()))[0] == 200  # and it goes on


def test_headers_that_go_with_a_refusal(served):
    assert ask(served, b"", token="wrong")[2]["WWW-Authenticate"] == "Bearer"
    assert ask(served, b"", method="PUT")[2]["Allow"] == "POST"


def test_a_body_of_very_many_values_is_refused_before_it_is_read_as_json(red):
    with RewardServer(red) as server:
        status, answer, _ = ask(server, b"[" + b"[]," * 200_000 + b"[]]")
    assert status == 413 and "more than 262144 values" in answer


def test_a_decompression_bomb_is_known_by_its_header(served):
    """A PNG of 60000 x 60000 pixels, 10.8 GB decoded, in 200 bytes; its data is never looked at."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(160)
    status, answer, _ = ask(served, body(bomb))
    assert status == 413 and "more than 10000 pixels" in answer


@pytest.mark.parametrize(
    "headers, status",
    [
        ("Content-Length: 10000000000", 413),
        ("Content-Length: " + "9" * 5000, 413),
        ("Content-Length: -5", 400),
        ("Content-Length: \u00b2", 400),
        ("Content-Length: many", 400),
        ("Transfer-Encoding: chunked", 411),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", 411),
        ("Accept: x", 411),
        ("Expect: 100-continue\r\nContent-Length: 10000000000", 413),
    ],
)
def test_the_headers_alone_are_answered(served, headers, status):
    """Nothing of the body is sent, so nothing of it can have been read."""
    start = time.monotonic()
    answer = raw(served, f"POST /score HTTP/1.1\r\nAuthorization: Bearer secret\r\n{headers}\r\n\r\n".encode("latin-1"))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and b"100 Continue" not in answer
    assert time.monotonic() - start < 10


def test_a_wrong_token_is_answered_before_the_body_is_read(served):
    assert raw(served, "POST /score HTTP/1.1\r\nContent-Length: 9000\r\n\r\n").startswith(b"HTTP/1.1 401 ")


def test_who_is_refused_while_sending_gets_to_read_why(served, monkeypatch):
    """Eight megabytes do not fit into the socket's buffers: closing at once would reset the connection."""
    monkeypatch.setattr(server_module, "LINGER", 20.0)
    answer = raw(served, b"POST /score HTTP/1.1\r\nContent-Length: 8000000\r\n\r\n" + bytes(8_000_000))
    assert answer.startswith(b"HTTP/1.1 401 ") and b"missing or wrong" in answer


def test_a_body_is_asked_for_once_the_headers_are_in_order(served):
    data = json.dumps(body(png())).encode()
    head = (
        f"POST /score HTTP/1.1\r\nAuthorization: Bearer secret\r\nExpect: 100-continue\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    answer = raw(served, head.encode() + data)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_line, status", [("FLY / HTTP/1.1", 501), ("GET", 400), ("GET / HTTP/9.1", 505), ("GET /" + "x" * 70000, 414)]
)
def test_what_is_no_request(served, request_line, status):
    answer = raw(served, f"{request_line}\r\n\r\n")
    assert f" {status} ".encode() in answer and b'{"error": ' in answer


def test_headers_without_end(served):
    assert b" 431 " in raw(served, "GET /health HTTP/1.1\r\n" + "".join(f"X{i}: {'y' * 8000}\r\n" for i in range(30)))


def test_health_needs_no_token_and_metrics_count(served):
    assert ask(served, None, "/health", "GET", token="")[:2] == (200, '{"status": "ok"}')
    ask(served, body(png(), png()))
    ask(served, b"{", token="wrong")
    status, text, headers = ask(served, None, "/metrics", "GET", token="")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    prefix = "blip3o_reward_"
    assert values[prefix + 'requests_total{status="200"}'] == "2" and values[prefix + 'requests_total{status="401"}'] == "1"
    assert (values[prefix + "images_total"], values[prefix + "batches_total"], values[prefix + "waiting"]) == ("2", "1", "0")
    assert float(values[prefix + "request_seconds_total"]) > 0


def test_a_request_that_drips_is_cut_off_after_all(red):
    """A byte every 0.1 s keeps any timeout of a single read from expiring."""
    limits = Limits(read_seconds=0.5)
    with RewardServer(red, limits=limits) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for head, status in ((b"", None), (b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 408 ")):
            start = time.monotonic()
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(head)
                answer, ended = b"", False
                while not ended and time.monotonic() - start < 15:
                    try:
                        connection.sendall(b"P")
                        connection.settimeout(0.1)
                        ended = not (read := connection.recv(65536))
                        answer += read
                    except TimeoutError:
                        pass
                    except OSError:
                        ended = True
            assert ended and time.monotonic() - start < 10
            assert answer.startswith(status) if status else answer == b""


def test_requests_beyond_the_limit_are_told_to_come_back(red):
    with RewardServer(red, limits=Limits(max_waiting=2)) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, server, body(png(), prompts=["wait"]))]
        assert red.waiting.acquire(timeout=10)  # before the second comes, or both would be scored at once
        waiting.append(pool.submit(ask, server, body(png(), prompts=["wait"])))
        until(lambda: "waiting 1\n" in ask(server, None, "/metrics", "GET")[1])
        status, answer, headers = ask(server, body(png()))
        assert (status, headers["Retry-After"]) == (503, "1") and "try again later" in answer
        assert ask(server, None, "/health", "GET")[0] == 200  # which takes no room
        red.gate.set()
        assert [w.result(20)[0] for w in waiting] == [200, 200]
        assert ask(server, body(png()))[0] == 200


def test_requests_that_would_take_too_much_memory_are_told_to_come_back(red):
    """Two may not be held at once: each may take 4 bodies of 100 kB."""
    with RewardServer(red, limits=LIMITS) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        large = json.dumps(body(png(), prompts=["wait"])).encode()
        large += b" " * (90_000 - len(large))
        waiting = pool.submit(ask, server, large)
        assert red.waiting.acquire(timeout=10)
        assert ask(server, large)[0] == 503
        red.gate.set()
        assert waiting.result(20)[0] == 200
        assert ask(server, large)[0] == 200  # the room was given back


def test_the_room_is_given_back_by_requests_that_were_refused(red):
    with RewardServer(red, limits=Limits(max_waiting=1)) as server:
        for data in (b"{", body(png()[:50]), body(png(), prompts=["fail"]), body(png(), prompts=["refuse"])):
            assert ask(server, data)[0] in (400, 422, 500)
        assert ask(server, body(png()))[0] == 200


def test_connections_are_bounded(red, monkeypatch):
    monkeypatch.setattr(server_module, "SPARE", 1)
    with RewardServer(red, limits=Limits(max_waiting=1)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(2)]
        until(lambda: raw(server, "").startswith(b"HTTP/1.1 503 "))
        for connection in idle:
            connection.close()
        until(lambda: ask(server, body(png()))[0] == 200)


def until(holds, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.02)


def test_64_clients_at_once(served, red):
    def client(index: int) -> list[bool]:
        answers = []
        for turn in range(3):
            value = (3 * index + turn) % 256
            status, answer, _ = ask(served, body(png(value), png((value + 1) % 256)))
            answers.append(status == 200 and json.loads(answer)["total"] == [value, (value + 1) % 256])
        return answers

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert all(all(answers) for answers in pool.map(client, range(64)))
    assert sum(red.sizes) == 64 * 3 * 2 and max(red.sizes) <= LIMITS.batch


def test_a_reward_that_takes_too_long(red):
    with RewardServer(red, limits=Limits(score_seconds=0.1)) as server:
        status, answer, _ = ask(server, body(png(), prompts=["wait"]))
        red.gate.set()
    assert status == 503 and "no scores within 0.1 s" in answer


def test_serve_refuses_what_cannot_work(red, monkeypatch):
    with pytest.raises(UserError, match="open to other machines"):
        serve(red, "0.0.0.0")
    monkeypatch.delenv("NO_TOKEN_HERE", raising=False)
    with pytest.raises(UserError, match="token_env=NO_TOKEN_HERE"):
        serve(red, token_env="NO_TOKEN_HERE")
    with pytest.raises(UserError, match="batch=0 must be positive"):
        serve(red, batch=0)
    with pytest.raises(UserError, match="may take more than max_memory"):
        serve(red, max_body_mb=100, max_memory_mb=200)
    with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1:70000: .*port must be 0-65535"):
        serve(red, port=70000)
    with RewardServer(red) as server, pytest.raises(UserError, match=r"cannot listen on 127.0.0.1:\d+"):
        serve(red, port=int(server.url.rsplit(":", 1)[1]))
