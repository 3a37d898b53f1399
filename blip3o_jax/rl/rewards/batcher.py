"""Score the images of concurrent requests together, in as many calls at once as there are scorers.

Small requests go first, so that those of many clients do not wait for a few large ones. Large
requests run when no small one waits, or when small ones have used as much time as the previous
large one; of several scorers one is always reserved for small requests. For one event loop.
"""

import asyncio
import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards.png import Png
from blip3o_jax.rl.rewards.processes import ProcessEnded
from blip3o_jax.rl.rewards.reward import Scores
from blip3o_jax.rl.rewards.scorer_process import ImageScore
from blip3o_jax.rl.rewards.server_processes import Scorers
from blip3o_jax.serving.refused import Refused

LOOKED_AT = 1024  # images that are searched for others of the first one's size


@dataclasses.dataclass(eq=False)
class Job:
    """Hold one request: images with their prompts and metadata (JSON). `alone`: not to be scored
    with others."""

    images: Sequence[Png]
    prompts: Sequence[str]
    metadata: Sequence[bytes]
    alone: bool = False

    def __post_init__(self) -> None:
        self.pixels = sum(image.pixels for image in self.images)
        self.waiting = collections.deque(range(len(self.images)))
        self.scores: list[ImageScore | None] = [None] * len(self.images)
        self.done = asyncio.get_running_loop().create_future()


@dataclasses.dataclass(frozen=True)
class _ScoringBatch:
    """Hold the images that are scored in one call: (job, index of its image), all of one size."""

    items: list[tuple[Job, int]]
    large: bool


class Batcher:
    """Form calls of at most `batch` images; `pixels` and `file_bytes` bound a call too, except for
    a single image that is larger. A request of more than `pixels` is a large one. `on_batch(images,
    seconds)` is called after every call that gave scores."""

    def __init__(
        self,
        scorers: Scorers,
        *,
        batch: int,
        pixels: int,
        file_bytes: int,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ):
        self._scorers = scorers
        self._batch = batch
        self._pixels = pixels
        self._file_bytes = file_bytes
        self._on_batch = on_batch
        self._small: list[Job] = []
        self._large: list[Job] = []
        self._running: dict[asyncio.Task, _ScoringBatch] = {}
        self._small_seconds = 0.0  # that large requests have to wait for small ones

    def waiting(self) -> int:
        """Return the number of requests with images that are not being scored yet."""
        return len(self._small) + len(self._large)

    async def score(self, job: Job) -> Scores:
        """Return the scores of a request, which is dropped when the caller is cancelled.

        Raises Refused: with the status of the first image that has no score, 503 if no scorer
        starts, 504 if one took too long.
        """
        (self._large if job.pixels > self._pixels else self._small).append(job)
        self._hand_out()
        try:
            return await job.done
        finally:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        for lane in (self._small, self._large):
            if job in lane:
                lane.remove(job)

    def _hand_out(self) -> None:
        while len(self._running) < self._scorers.count and (batch := self._next()):
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running[task] = batch
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        del self._running[task]
        self._hand_out()

    def _next(self) -> _ScoringBatch | None:
        running = sum(batch.large for batch in self._running.values())
        large = bool(self._large) and running < max(1, self._scorers.count - 1)
        if self._small and not (large and self._small_seconds <= 0):
            return _ScoringBatch(self._taken(self._small), large=False)
        return _ScoringBatch(self._taken(self._large), large=True) if large else None

    def _taken(self, lane: list[Job]) -> list[tuple[Job, int]]:
        """Take images of one size from the first requests of a lane.

        Requests without further images leave the lane. The first request moves to the end, so that
        one of many images does not delay the others.
        """
        first = lane[0]
        size = _size(first.images[first.waiting[0]])
        jobs = [first] if first.alone else [job for job in lane if not job.alone]
        items: list[tuple[Job, int]] = []
        pixels = file_bytes = 0
        candidates = ((job, index) for job in jobs for index in job.waiting)
        for job, index in list(itertools.islice(candidates, LOOKED_AT)):
            image = job.images[index]
            if _size(image) != size:
                continue
            pixels += image.pixels
            file_bytes += image.file.nbytes
            if items and (
                pixels > self._pixels or file_bytes > self._file_bytes or len(items) == self._batch
            ):
                break
            items.append((job, index))
            job.waiting.remove(index)
        lane[:] = [job for job in (*lane[1:], first) if job.waiting]
        return items

    async def _run(self, batch: _ScoringBatch) -> None:
        items = batch.items
        images = [job.images[index] for job, index in items]
        began = time.monotonic()
        try:
            scores, seconds = await self._scorers.score(
                [image.file for image in images],
                _size(images[0]),
                [job.prompts[index] for job, index in items],
                [job.metadata[index] for job, index in items],
            )
        except TimeoutError:
            _refuse_all(
                items,
                Refused(
                    504,
                    "the reward took too long; its process was ended and another one is started",
                ),
            )
        except ProcessEnded as error:
            line = (
                f"the reward ended its process (exit code {error.args[0]}); another one is started"
            )
            if not self._split(batch, items):
                _refuse_all(items, Refused(500, line))
        except UserError as error:
            _refuse_all(items, Refused(503, str(error), {"Retry-After": "10"}))
        except Exception as error:
            _refuse_all(
                items, Refused(500, f"scoring failed: {type(error).__name__}: {error}"[:300])
            )
        else:
            if any(score.status == 200 for score in scores):
                self._on_batch(sum(score.status == 200 for score in scores), seconds)
            self._record(batch, scores)
        finally:
            taken = time.monotonic() - began
            # What a large call took is what small ones may take before the next large one.
            self._small_seconds = taken if batch.large else self._small_seconds - taken

    def _record(self, batch: _ScoringBatch, scores: Sequence[ImageScore]) -> None:
        failed = []
        for (job, index), score in zip(batch.items, scores, strict=True):
            if score.status == 500:
                failed.append((job, index))
            job.scores[index] = score
        if failed and self._split(batch, failed):
            for job, index in failed:
                job.scores[index] = None
        for job in _jobs(batch.items):
            if not job.done.done() and None not in job.scores:
                _settle(job)

    def _split(self, batch: _ScoringBatch, items: Sequence[tuple[Job, int]]) -> bool:
        """Queue each request of a batch to be scored alone, since one may have failed all.

        Returns False if the batch holds a single request.
        """
        # Only one request: no other can have caused the failure.
        if len(_jobs(batch.items)) == 1:
            return False
        lane = self._large if batch.large else self._small
        for job, index in items:
            job.alone = True
            job.waiting.append(index)
        back = [job for job in _jobs(items) if not job.done.done() and job not in lane]
        lane[:0] = back
        return True


def _size(image: Png) -> tuple[int, int]:
    return image.height, image.width


def _jobs(items: Iterable[tuple[Job, int]]) -> list[Job]:
    return list(dict.fromkeys(job for job, _ in items))


def _refuse_all(items: Iterable[tuple[Job, int]], refused: Refused) -> None:
    for job in _jobs(items):
        if not job.done.done():
            job.done.set_exception(refused)


def _settle(job: Job) -> None:
    """Answer a request whose images are all scored."""
    scores = [score for score in job.scores if score is not None]
    for index, score in enumerate(scores):
        if score.status != 200:
            image = f" (images[{index}])" if len(job.images) > 1 else ""
            job.done.set_exception(Refused(score.status, score.reason + image))
            return
    names = {tuple(sorted(score.parts)) for score in scores}
    if len(names) > 1:
        different = " and ".join(sorted(", ".join(some) or "none" for some in names))
        job.done.set_exception(
            Refused(500, f"the reward failed: it has parts {different} for images of one request")
        )
        return
    total_B = np.array([score.total for score in scores], np.float32)
    parts = {
        name: np.array([score.parts[name] for score in scores], np.float32)
        for name in sorted(scores[0].parts)
    }
    job.done.set_result(Scores(total_B, parts))
