"""Define a reward server's scorers without processes, and bodies of requests, for the tests of
server and client."""

import asyncio
import base64
import io
import json
import threading
import urllib.error
import urllib.request

import numpy as np
from PIL import Image

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards import scorer_process
from blip3o_jax.rl.rewards.reward import Reward, Scores
from blip3o_jax.rl.rewards.weighted import WeightedRewards


class Red(Reward):
    """Score the mean red of each image. Fails at the prompt "fail", refuses "refuse", and waits for
    `gate` at "wait"."""

    def __init__(self):
        self.gate, self.waiting, self.sizes, self.images = (
            threading.Event(),
            threading.Semaphore(0),
            [],
            0,
        )

    def check(self, prompt, metadata):
        if prompt == "refuse":
            raise UserError("cannot judge this\nand why")
        if prompt == "stumble":
            raise KeyError("stumbled")

    def __call__(self, images_BHWC, prompts, metadata):
        self.sizes.append(len(prompts))
        self.images += len(prompts)
        if "fail" in prompts:
            raise RuntimeError("out of paint\nand more")
        if "wait" in prompts:
            self.waiting.release()
            assert self.gate.wait(20)
        third_B = np.array([m.get("x", 0.3) / 3 for m in metadata], np.float32)
        return Scores(images_BHWC[..., 0].mean(axis=(1, 2), dtype=np.float32), {"third": third_B})


class InProcess:
    """Run scorers of one reward in threads."""

    def __init__(self, reward, count=1):
        self.names = ["red"]
        self.count = count
        self.up = count
        self.ends = {}
        self._weighted = object.__new__(WeightedRewards)
        self._weighted._terms = [("red", RewardConfig("red"), reward)]

    def ready(self):
        return self.up

    async def score(self, files, size, prompts, metadata):
        rows = [(text, json.loads(fields)) for text, fields in zip(prompts, metadata, strict=True)]
        return await asyncio.to_thread(scorer_process.score_rows, self._weighted, files, size, rows)

    def close(self):
        pass


def png(value: int = 7, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def body(*files: bytes, prompts: list | None = None) -> dict:
    prompts = prompts or ["red"] * len(files)
    return {
        "prompts": prompts,
        "metadata": [{}] * len(files),
        "images": [base64.b64encode(f).decode() for f in files],
    }


def ask(url, data, path="/score", method="POST", token="secret", timeout=20):
    """Return (status, answer, headers)."""
    data = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(url + path, data, method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers
