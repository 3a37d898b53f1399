"""Run rewards in separate processes: images go in chunks to the free processes, while the run
continues.

A scorer's failures stay in its process:

    raises, returns NaN or the wrong number of scores    a reason in place of these images' scores
                                                         (`weighted`)
    takes longer than `timeout` an image                 its process is killed and replaced
    ends its process                                     another one is started
    cannot be created                                    `result` and `check` raise the reason

The failed images of a chunk are scored again one by one, each up to `retries` times, and at least
once if the whole chunk failed, since one image may have failed all. After BREAKER chunks in a row
of which every image failed, the waiting chunks are cancelled, until the next `submit`.

Shape suffixes: B images, H height, W width, C colour channels; n of a chunk.
"""

import collections
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards import http, worker
from blip3o_jax.rl.rewards.processes import Future, ProcessEnded, Processes
from blip3o_jax.rl.rewards.weighted import Outcome, failed, labels

CHUNK = 4  # images: few, so that processes end together and a hung image holds up few others
BREAKER = 4
START_TIMEOUT = 300.0  # seconds that a process may take to make its rewards
REASONS_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class PoolResult:
    """Hold the rewards of one `submit`. `total_B` float32 [B]: the weighted sum, 0 (meaningless)
    where `failed_B`. `parts`: float32 [B] by name, NaN where there is none. `reasons`: number of
    images by reason of failure. `seconds`: of an image in its process (`median`, `max`), of chunks
    until a process is free (`queue`, a mean), and from submission to the last score (`total`)."""

    total_B: np.ndarray
    failed_B: np.ndarray
    parts: dict[str, np.ndarray]
    reasons: dict[str, int]
    seconds: dict[str, float]


def check_failed(
    failed_B: np.ndarray, reasons: Mapping[str, int], max_failed_fraction: float
) -> None:
    """Raise UserError, with the commonest reasons, where a larger fraction of the images than
    `max_failed_fraction` has no score.
    """
    if failed_B.mean() > max_failed_fraction:
        shown = collections.Counter(reasons).most_common(REASONS_SHOWN)
        raise UserError(
            f"{failed_B.sum()} of {len(failed_B)} images have no reward, a larger fraction than "
            "rl.max_failed_fraction="
            f"{max_failed_fraction:g}: "
            f"{'; '.join(f'{count} x {reason}' for reason, count in shown)}"
        )


class RewardPool:
    """Score images in `workers` processes (0: one for each core), which each create the `rewards`.

    `timeout` is in seconds for each image.
    """

    def __init__(
        self,
        rewards: tuple[RewardConfig, ...],
        *,
        workers: int = 0,
        timeout: float = 60.0,
        retries: int = 1,
        start_timeout: float = START_TIMEOUT,
    ):
        for reward in rewards:
            http.check_timeout(reward, timeout)
        self._timeout, self._retries = timeout, retries
        self._names = ", ".join(labels(rewards))
        self._processes = Processes(
            worker.start,
            (rewards,),
            workers=workers or os.cpu_count() or 1,
            start_timeout=start_timeout,
            what=f"reward {self._names}",
        )
        self._lock = threading.RLock()  # guards this one and what is pending
        self._failures = 0  # chunks in a row of which every image failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes at once."""
        self._processes.close()

    def check(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Wait until a process has its rewards and has checked every (prompt, metadata). Raises
        UserError for rewards that cannot be made and for the first prompt that one of them cannot
        score.
        """
        self._processes.call(worker.check, lambda: (list(prompts),)).result()

    def submit(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> "Pending":
        """Start scoring uint8 images [B, H, W, 3], which must stay as they are until `result` has
        returned.
        """
        pending = Pending(np.asarray(images_BHWC), prompts, metadata)
        self._failures = 0
        for start in range(0, len(images_BHWC), CHUNK):
            self._score(pending, range(start, min(start + CHUNK, len(images_BHWC))), None)
        return pending

    def _score(self, pending: "Pending", rows: Sequence[int], tries: int | None) -> None:
        """Submit `rows` as one chunk. `tries`: how often an image that fails is tried after that;
        None for the first time."""
        future = self._processes.call(
            worker.score, lambda: pending.arguments(rows), self._timeout * len(rows)
        )
        on_result = functools.partial(self._on_result, pending, rows, tries, time.monotonic())
        future.add_done_callback(on_result)

    def _on_result(
        self,
        pending: "Pending",
        rows: Sequence[int],
        tries: int | None,
        began: float,
        future: Future,
    ) -> None:
        """Record a result. Called in the thread of the processes, or in the submitting one for a
        result that was faster.
        """
        with self._lock:
            self._record(pending, rows, tries, began, future)

    def _record(
        self,
        pending: "Pending",
        rows: Sequence[int],
        tries: int | None,
        began: float,
        future: Future,
    ) -> None:
        if future.cancelled():
            pending.record(
                rows, failed(len(rows), f"given up: {BREAKER} chunks in a row failed"), final=True
            )
            return
        match error := future.exception():
            case None:
                outcome, seconds = future.result()
                pending.record_seconds(seconds / len(rows), time.monotonic() - began - seconds)
            case TimeoutError():
                outcome = failed(
                    len(rows), f"{self._names}: took longer than {self._timeout:g} s an image"
                )
            case ProcessEnded(args=(code,)):
                outcome = failed(len(rows), f"{self._names}: ended its process (exit code {code})")
            case _:  # the rewards cannot be created, or the arguments cannot be sent
                pending.stop(error)
                return
        wrong = [row for row, reason in zip(rows, outcome.reasons, strict=True) if reason]
        whole = len(wrong) == len(rows)
        self._failures = 0 if not whole else self._failures + (tries is None)
        given_up = self._failures >= BREAKER
        if tries is None:
            tries = max(1, self._retries) if whole and len(rows) > 1 else self._retries
        pending.record(rows, outcome, final=given_up or not tries)
        if given_up:
            self._processes.drop()
        elif tries:
            for row in wrong:
                self._score(pending, [row], tries - 1)


class Pending:
    """Hold scores that are being computed."""

    def __init__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ):
        if not len(images_BHWC) == len(prompts) == len(metadata):
            raise ValueError(
                f"{len(images_BHWC)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            )
        self._images_BHWC = images_BHWC
        self._prompts = prompts
        self._metadata = metadata
        self._error: BaseException | None = None
        self._finished = threading.Event()
        count = len(images_BHWC)
        self._total_B = np.zeros(count, np.float32)
        self._reasons: list[str | None] = [None] * count
        self._parts: dict[str, np.ndarray] = {}
        self._latencies: list[float] = []
        self._queue: list[float] = []
        self._left = count
        self._began = time.monotonic()
        self._seconds = 0.0
        if not count:
            self._finished.set()

    def done(self) -> bool:
        return self._finished.is_set()

    def result(self) -> PoolResult:
        """Wait for the last score. Raises UserError where processes cannot start or cannot make
        their rewards.
        """
        self._finished.wait()
        if self._error is not None:
            raise self._error
        seconds = {
            "median": float(np.median(self._latencies)) if self._latencies else 0.0,
            "max": max(self._latencies, default=0.0),
            "queue": float(np.mean(self._queue)) if self._queue else 0.0,
            "total": self._seconds,
        }
        failed_B = np.array([reason is not None for reason in self._reasons])
        return PoolResult(
            self._total_B,
            failed_B,
            self._parts,
            dict(collections.Counter(filter(None, self._reasons))),
            seconds,
        )

    def arguments(
        self, rows: Sequence[int]
    ) -> tuple[np.ndarray, list[str], list[Mapping[str, Any]]]:
        """Return the arguments of `worker.score` for some images."""
        some = slice(rows[0], rows[-1] + 1)  # neighbours, so that nothing is copied
        return self._images_BHWC[some], list(self._prompts[some]), list(self._metadata[some])

    def record(self, rows: Sequence[int], outcome: Outcome, *, final: bool) -> None:
        """Store the scores, and the reasons of failed images if they are not tried again."""
        for name, values in outcome.parts.items():
            self._parts.setdefault(name, np.full(len(self._total_B), np.nan, np.float32))[
                list(rows)
            ] = values
        for row, total, reason in zip(rows, outcome.total_B, outcome.reasons, strict=True):
            if reason is None:
                self._total_B[row] = total
            elif final:
                self._reasons[row] = reason
            self._left -= reason is None or final
        if self._left == 0:
            self._seconds = time.monotonic() - self._began
            self._finished.set()

    def record_seconds(self, image: float, queue: float) -> None:
        self._latencies.append(image)
        self._queue.append(queue)

    def stop(self, error: BaseException) -> None:
        self._error = error
        self._finished.set()
