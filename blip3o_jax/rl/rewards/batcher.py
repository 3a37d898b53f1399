"""Scores the images of concurrent requests together, on one thread.

Shape suffixes: B images of a batch, N images of all requests at hand, H height, W width, C colour channels.
"""

import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.rl.rewards.reward import Scores

_TOTAL = ""  # beside the names of the parts


@dataclasses.dataclass(frozen=True)
class Job:
    """One request: images [H, W, C] that may differ in size."""

    images: Sequence[np.ndarray]
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    done: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)


class Batcher:
    """While one batch is scored, requests gather for the next: up to `batch` images of one size in a call of the reward, which
    returns `Scores`, or an `Outcome` of weighted rewards, whose reasons are failures. Who calls `score` bounds how many wait.
    `on_batch(images, seconds)` is told of every call that gave scores."""

    def __init__(self, reward: Callable[..., Scores], batch: int, on_batch: Callable[[int, float], None]):
        self._reward, self._batch, self._on_batch = reward, batch, on_batch
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
        self._thread.start()

    def score(self, job: Job, seconds: float) -> Scores:
        """Waits for the scores. Raises what the reward raised, or TimeoutError."""
        self._jobs.put(job)
        try:
            return job.done.result(timeout=seconds)
        finally:
            job.done.cancel()

    def waiting(self) -> int:
        return self._jobs.qsize()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            while sum(len(job.images) for job in jobs) < self._batch and not self._jobs.empty():
                if (job := self._jobs.get()) is None:
                    self._jobs.put(None)
                    break
                jobs.append(job)
            self._answer([job for job in jobs if job.done.set_running_or_notify_cancel()])

    def _answer(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        try:
            scores = self._score(jobs)
        except Exception as error:
            if len(jobs) > 1:  # one of them spoils it for all: each on its own
                for job in jobs:
                    self._answer([job])
                return
            logging.exception("the reward failed")
            jobs[0].done.set_exception(error)
            return
        start = 0
        for job in jobs:
            here = slice(start, start := start + len(job.images))
            job.done.set_result(Scores(scores.total_B[here], {name: part[here] for name, part in scores.parts.items()}))

    def _score(self, jobs: Sequence[Job]) -> Scores:
        images, prompts, metadata = (
            [value for job in jobs for value in getattr(job, name)] for name in ("images", "prompts", "metadata")
        )
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image_HWC in enumerate(images):
            by_size.setdefault(image_HWC.shape, []).append(index)
        parts: dict[str, np.ndarray] = {}
        for same in by_size.values():
            for first in range(0, len(same), self._batch):
                indices = same[first : first + self._batch]
                values = self._call(*([column[i] for i in indices] for column in (images, prompts, metadata)))
                if parts and set(parts) != set(values):
                    raise ValueError(f"the reward has parts {_names(values)} for some images and {_names(parts)} for others")
                for name, values_B in values.items():
                    parts.setdefault(name, np.zeros(len(images), np.float32))[indices] = values_B
        return Scores(parts.pop(_TOTAL), parts)

    def _call(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """One call of the reward: its parts, and the total under `_TOTAL`."""
        start = time.monotonic()
        scores = self._reward(np.stack(images), prompts, metadata)
        if failure := next((reason for reason in getattr(scores, "reasons", ()) if reason), None):
            raise ValueError(failure)
        with np.errstate(over="ignore"):  # becomes infinite, and an error below
            values = {name: np.asarray(v, np.float32) for name, v in ((_TOTAL, scores.total_B), *scores.parts.items())}
        for name, values_B in values.items():
            if np.shape(values_B) != (len(images),) or not np.isfinite(values_B).all():
                raise ValueError(f"{name or 'total'} of {len(images)} images is not {len(images)} finite numbers")
        self._on_batch(len(images), time.monotonic() - start)
        return values


def _names(parts: Mapping[str, np.ndarray]) -> str:
    return ", ".join(sorted(set(parts) - {_TOTAL})) or "none"
