"""The reward server's scorer processes: one that hangs or dies is replaced, and so are all where none starts any more."""

import asyncio
import concurrent.futures
import logging
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards import scorer, worker
from blip3o_jax.rl.rewards.processes import ProcessEnded, Processes
from blip3o_jax.rl.rewards.weighted import labels

START_TIMEOUT = 600.0  # seconds that a process may take to make its rewards: models are loaded
PAUSE = 5.0  # seconds before processes that did not start are tried again; twice as long each time
LONGEST_PAUSE = 60.0


class Scorers(Protocol):
    """What the server scores with."""

    count: int  # calls that run at once
    names: list[str]  # of the rewards

    def ready(self) -> int:
        """Return how many of `count` take calls."""
        ...

    async def score(
        self,
        files: Sequence[np.ndarray],
        size: tuple[int, int],
        prompts: Sequence[str],
        metadata: Sequence[bytes],
    ) -> tuple[list[scorer.Verdict], float]:
        """As `scorer.score`. Raises TimeoutError or ProcessEnded, of a process that has been replaced, and UserError where
        none starts."""
        ...

    def close(self) -> None: ...


class ScorerProcesses:
    """`count` processes that each make the `rewards`. A call that takes longer than `timeout` seconds is ended, with its
    process. UserError where the rewards cannot be made. `on_end(reason)` hears of every process that had to be replaced."""

    def __init__(self, rewards: tuple[RewardConfig, ...], count: int, timeout: float, *, pause: float = PAUSE):
        self.count = count
        self.names = labels(rewards)
        self.ends = {"timeout": 0, "ended": 0, "not started": 0}
        self._rewards = rewards
        self._timeout = timeout
        self._pause = pause
        self._failures = 0
        self._again: concurrent.futures.Future | asyncio.TimerHandle | None = None
        self._processes = self._started()
        try:
            self._processes.call(worker.check, lambda: ([],)).result()
        except BaseException:
            self._processes.close()
            raise

    def _started(self) -> Processes:
        threads = max(1, (os.cpu_count() or 1) // self.count)
        return Processes(
            scorer.start,
            (self._rewards, threads),
            workers=self.count,
            start_timeout=START_TIMEOUT,
            what=f"reward {', '.join(self.names)}",
        )

    def ready(self) -> int:
        return self._processes.ready()

    async def score(
        self,
        files: Sequence[np.ndarray],
        size: tuple[int, int],
        prompts: Sequence[str],
        metadata: Sequence[bytes],
    ) -> tuple[list[scorer.Verdict], float]:
        call = self._processes.call(scorer.score, lambda: (files, size, prompts, metadata), self._timeout)
        try:
            found = await asyncio.wrap_future(call)
        except TimeoutError:
            self.ends["timeout"] += 1
            raise
        except ProcessEnded as error:
            self.ends["ended"] += 1
            logging.error("a scorer ended with exit code %s; another one is started", *error.args)
            raise
        except UserError:
            self._start_again_later()
            raise
        self._failures = 0
        return found

    def _start_again_later(self) -> None:
        """Processes that end while they start, or hang, are given up for a while only: a server is to run for days."""
        if self._processes.error is None or self._again is not None:
            return
        seconds = min(self._pause * 2**self._failures, LONGEST_PAUSE)
        self._failures += 1
        self.ends["not started"] += 1
        logging.error("%s; tried again in %g s", self._processes.error, seconds)
        self._again = asyncio.get_running_loop().call_later(seconds, self._start_again)

    def _start_again(self) -> None:
        self._again = None
        self._processes.close()
        self._processes = self._started()

    def close(self) -> None:
        self._processes.close()
