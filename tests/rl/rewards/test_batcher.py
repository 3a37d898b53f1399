"""Requests scored together get what they would get alone."""

import threading
import types

import numpy as np
import pytest

from blip3o_jax.rl.rewards.batcher import Batcher, Job
from blip3o_jax.rl.rewards.reward import Scores


def red(images_BHWC, prompts, metadata):
    """The mean red of each image; part `asked` from the metadata. A prompt "spoil" makes it fail."""
    if "spoil" in prompts:
        raise RuntimeError("spoiled")
    total_B = images_BHWC[..., 0].mean(axis=(1, 2), dtype=np.float32)
    return Scores(total_B, {"asked": np.array([m["asked"] for m in metadata], np.float32)})


def job(value: int, count: int = 1, size: int = 8, prompt: str = "red") -> Job:
    images = [np.full((size, size, 3), value + i, np.uint8) for i in range(count)]
    return Job(images, [prompt] * count, [{"asked": value}] * count)


class Held:
    """Holds back the first call of a reward until `release`, and notes how many images each call had."""

    def __init__(self, reward=red):
        self.reward, self.calls, self.release, self.called = reward, [], threading.Event(), threading.Event()

    def __call__(self, images_BHWC, prompts, metadata):
        self.calls.append(len(prompts))
        self.called.set()
        assert self.release.wait(30)
        return self.reward(images_BHWC, prompts, metadata)


def together(reward, jobs: list[Job], batch: int = 16):
    """Scores of jobs that all wait while another is scored, and the calls of the reward after that one."""
    held = Held(reward)
    batcher = Batcher(held, batch, lambda images, seconds: None)
    results: list = [None] * len(jobs)

    def ask(index: int) -> None:
        try:
            results[index] = batcher.score(jobs[index], 30)
        except Exception as error:
            results[index] = error

    first = threading.Thread(target=batcher.score, args=(job(0), 30))
    first.start()
    assert held.called.wait(30)
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(jobs))]
    for index, thread in enumerate(threads):
        thread.start()
        while batcher.waiting() <= index:  # in this order
            pass
    held.release.set()
    for thread in (first, *threads):
        thread.join(30)
    batcher.close()
    return results, held.calls[1:]


def test_requests_that_wait_are_scored_together_up_to_the_batch():
    jobs = [job(10, 2), job(20, 3), job(30, 1), job(40, 5)]
    results, calls = together(red, jobs, batch=6)
    assert calls == [6, 5]
    for asked, scores in zip(jobs, results, strict=True):
        np.testing.assert_array_equal(scores.total_B, [image[0, 0, 0] for image in asked.images])
        np.testing.assert_array_equal(scores.parts["asked"], [m["asked"] for m in asked.metadata])


def test_a_request_larger_than_the_batch_is_split_and_sizes_do_not_mix():
    mixed = job(10, 5)
    mixed = Job([*mixed.images, *job(90, 1, size=12).images, *job(70, 1).images], ["red"] * 7, [{"asked": i} for i in range(7)])
    (scores,), calls = together(red, [mixed], batch=4)
    assert calls == [4, 2, 1]
    np.testing.assert_array_equal(scores.total_B, [10, 11, 12, 13, 14, 90, 70])
    np.testing.assert_array_equal(scores.parts["asked"], range(7))


def test_one_request_does_not_spoil_the_others():
    (good, bad, other), calls = together(red, [job(10), job(20, prompt="spoil"), job(30)])
    assert good.total_B == 10 and other.total_B == 30
    assert isinstance(bad, RuntimeError)
    assert calls == [3, 1, 1, 1]


@pytest.mark.parametrize(
    "values, parts, message",
    [
        ([np.nan], {}, "total of 1 images is not 1 finite numbers"),
        ([1e39], {}, "total of 1 images is not 1 finite numbers"),
        ([1, 2], {}, "total of 1 images is not 1 finite numbers"),
        ([1], {"p": np.array([np.inf])}, "p of 1 images is not 1 finite numbers"),
    ],
)
def test_what_is_no_score_is_an_error(values, parts, message):
    ((error,), _) = together(
        lambda *asked: Scores(np.array(values), parts) if asked[1] == ["it"] else red(*asked), [job(1, prompt="it")]
    )
    assert isinstance(error, ValueError) and message in str(error)


def test_the_reason_of_a_weighted_reward_is_the_error():
    def reward(images_BHWC, prompts, metadata):
        reasons = ["ocr: cannot read" if prompt == "it" else None for prompt in prompts]
        return types.SimpleNamespace(total_B=np.zeros(len(prompts)), parts={}, reasons=reasons)

    ((good, error), _) = together(reward, [job(1), job(1, prompt="it")])
    assert good.total_B == 0 and isinstance(error, ValueError) and str(error) == "ocr: cannot read"


def test_parts_that_differ_within_a_request_are_an_error():
    def reward(images_BHWC, prompts, metadata):
        return Scores(np.zeros(len(prompts), np.float32), {f"size{images_BHWC.shape[1]}": np.zeros(len(prompts), np.float32)})

    mixed = Job([*job(1).images, *job(1, size=12).images], ["red"] * 2, [{}] * 2)
    ((error,), _) = together(reward, [mixed])
    assert isinstance(error, ValueError) and "has parts size12 for some images and size8 for others" in str(error)


def test_who_does_not_wait_any_longer_is_not_scored():
    held = Held()
    batcher = Batcher(held, 16, lambda images, seconds: None)
    first = threading.Thread(target=batcher.score, args=(job(0), 30))
    first.start()
    assert held.called.wait(30)
    with pytest.raises(TimeoutError):
        batcher.score(job(1), 0.01)
    held.release.set()
    first.join(30)
    batcher.close()
    assert held.calls == [1]
