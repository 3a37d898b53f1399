"""Check that requests scored together get the scores that they get alone."""

import asyncio
import types

import numpy as np
import pytest

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards import batcher
from blip3o_jax.rl.rewards.batcher import Batcher, Job
from blip3o_jax.rl.rewards.processes import ProcessEnded
from blip3o_jax.rl.rewards.scorer_process import ImageScore
from blip3o_jax.serving.refused import Refused


def job(value: int, count: int = 1, size: int = 8, prompt: str = "red") -> Job:
    """Return images whose scores are value, value + 1, ..."""
    images = [
        types.SimpleNamespace(
            height=size, width=size, pixels=size * size, file=np.zeros(10, np.uint8)
        )
    ] * count
    return Job(images, [prompt] * count, [b"%d" % (value + index) for index in range(count)])


class Held:
    """Answer the first call after `release`, and record how many images each call had."""

    def __init__(self, count=1):
        self.count, self.calls, self.release = count, [], asyncio.Event()

    async def score(self, files, size, prompts, metadata):
        self.calls.append(len(prompts))
        await self.release.wait()
        values = list(map(int, metadata))
        match next((prompt for prompt in prompts if prompt != "red"), None):
            case "spoil":
                return [ImageScore(500, "spoiled")] * len(values), 0.0
            case "die":
                raise ProcessEnded(-9)
            case "hang":
                raise TimeoutError
            case "unstarted":
                raise UserError("no process starts")
            case "large":
                self.calls[-1] = "large"
        refuse = [prompt == "refuse" for prompt in prompts]
        return [
            ImageScore(422, "cannot")
            if no
            else ImageScore(200, "", value, {f"of{size[0]}": value, "v": value})
            for value, no in zip(values, refuse, strict=True)
        ], 0.5


def together(*jobs_of, count=1, **limits):
    """Return the results of requests that all wait while another is scored, and the calls after
    that one."""

    async def run():
        held = Held(count)
        queue = Batcher(held, **{"batch": 16, "pixels": 1 << 20, "file_bytes": 1 << 20} | limits)
        tasks = [asyncio.create_task(queue.score(job(0))) for _ in range(count)]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(queue.score(make())) for make in jobs_of]
        await asyncio.sleep(0)
        held.release.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert not queue.waiting() and not queue._running
        return results[count:], held.calls[count:]

    return asyncio.run(run())


def test_requests_that_wait_are_scored_together_up_to_the_batch():
    results, calls = together(
        lambda: job(10, 2), lambda: job(20, 3), lambda: job(30, 1), lambda: job(40, 5), batch=6
    )
    assert calls == [6, 5]
    for scores, (value, count) in zip(results, ((10, 2), (20, 3), (30, 1), (40, 5)), strict=True):
        np.testing.assert_array_equal(scores.total_B, np.arange(value, value + count))
        np.testing.assert_array_equal(scores.parts["v"], np.arange(value, value + count))


def test_a_request_larger_than_the_batch_is_split_and_lets_others_pass():
    (large, small), calls = together(lambda: job(10, 9), lambda: job(90, 2, size=12), batch=4)
    assert calls == [4, 2, 4, 1]
    np.testing.assert_array_equal(large.total_B, np.arange(10, 19))
    np.testing.assert_array_equal(small.total_B, [90, 91])


def test_sizes_do_not_mix_and_pixels_and_bytes_bound_a_call():
    jobs = [lambda: job(10, 2), lambda: job(20, 1, size=12), lambda: job(30, 1)]
    assert together(*jobs)[1] == [3, 1]
    assert together(*jobs, pixels=150)[1] == [2, 1, 1]
    assert together(*jobs, file_bytes=20)[1] == [2, 1, 1]
    assert together(lambda: job(10, size=99), pixels=150)[1] == [1]  # one is always taken


@pytest.mark.parametrize(
    ("prompt", "status", "line", "calls"),
    [
        ("spoil", 500, "spoiled", [3, 1, 1, 1]),
        ("die", 500, "exit code -9", [3, 1, 1, 1]),
        ("refuse", 422, "cannot", [3]),
    ],
)
def test_one_request_does_not_spoil_the_others(prompt, status, line, calls):
    (good, bad, other), called = together(
        lambda: job(10), lambda: job(20, prompt=prompt), lambda: job(30)
    )
    assert good.total_B == 10 and other.total_B == 30 and called == calls
    assert isinstance(bad, Refused) and bad.status == status and line in bad.line


@pytest.mark.parametrize(("prompt", "status"), [("hang", 504), ("unstarted", 503)])
def test_what_is_nobodys_fault_is_not_tried_again(prompt, status):
    results, calls = together(lambda: job(10), lambda: job(20, prompt=prompt))
    assert [refused.status for refused in results] == [status] * 2 and calls == [2]


def test_parts_that_differ_within_a_request_are_an_error():
    def mixed():
        both = [job(1), job(2, size=12)]
        return Job([j.images[0] for j in both], ["red"] * 2, [b"1", b"2"])

    ((error,), _) = together(mixed)
    assert (error.status, error.line) == (
        500,
        "the reward failed: it has parts of12, v and of8, v for images of one request",
    )


def test_small_requests_go_first_until_they_had_as_much_time_as_a_large_one(monkeypatch):
    clock = iter(range(100))  # every call takes a second, a large one three
    monkeypatch.setattr(batcher, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    large = lambda: job(0, size=99, prompt="large")
    _, calls = together(large, large, *[lambda: job(10)] * 3, batch=1, pixels=200)
    assert calls == ["large", 1, "large", 1, 1]
    assert together(*[large] * 2, batch=1, pixels=200)[1] == ["large"] * 2


def test_one_of_several_scorers_is_left_to_small_requests():
    _, calls = together(
        *[lambda: job(0, size=99, prompt="large")] * 2, lambda: job(1), count=2, pixels=200
    )
    assert calls.index(1) < 2


def test_who_does_not_wait_any_longer_is_not_scored():
    async def run():
        held = Held()
        queue = Batcher(held, batch=16, pixels=1 << 20, file_bytes=1 << 20)
        first = asyncio.create_task(queue.score(job(0)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.score(job(1)), 0.01)
        held.release.set()
        await first
        return held.calls

    assert asyncio.run(run()) == [1]
