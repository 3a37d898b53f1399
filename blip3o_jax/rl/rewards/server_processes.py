"""Run the reward server's processes.

A process that hangs or dies is replaced; if none starts any more, all are started again later.

    scorers    decode images and score them
    parser     parses large bodies: the JSON parser would block every thread of the server
"""

import asyncio
import concurrent.futures
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards import requests, scorer_process, worker
from blip3o_jax.rl.rewards.processes import ProcessEnded, Processes
from blip3o_jax.rl.rewards.weighted import labels
from blip3o_jax.serving.refused import Refused

START_TIMEOUT = 600.0  # seconds that a process may take to make its rewards: models are loaded
PARSE_TIMEOUT = 60.0
PAUSE = 5.0  # seconds before processes that did not start are tried again; twice as long each time
LONGEST_PAUSE = 60.0


class Scorers(Protocol):
    """Define the scoring processes of a server."""

    count: int  # calls that run at once
    names: list[str]  # of the rewards

    @property
    def ends(self) -> dict[str, int]:
        """Return how many processes were replaced, by reason."""
        ...

    def ready(self) -> int:
        """Return how many of `count` take calls."""
        ...

    async def score(
        self,
        files: Sequence[np.ndarray],
        size: tuple[int, int],
        prompts: Sequence[str],
        metadata: Sequence[bytes],
    ) -> tuple[list[scorer_process.ImageScore], float]:
        """Score as `scorer_process.score` does. Raises TimeoutError or ProcessEnded, of a process
        that has been replaced, and UserError where none starts."""
        ...

    def close(self) -> None: ...


class Renewed:
    """Run processes of the rewards' pool for a server that runs for days: after failures at
    start-up they are stopped for a while only. `ends`: how many were replaced, by reason."""

    def __init__(self, start: Callable[[], Processes], *, pause: float = PAUSE):
        self.ends = {"timeout": 0, "ended": 0, "not started": 0}
        self._start = start
        self._pause = pause
        self._failures = 0
        self._again: asyncio.TimerHandle | None = None
        self.now = start()

    async def call(self, function: Callable, arguments: Callable[[], tuple], timeout: float) -> Any:
        """Call a function as `Processes.call` does."""
        try:
            # Shielded: the call continues if the caller is cancelled, since a process runs it.
            future = asyncio.wrap_future(self.now.call(function, arguments, timeout))
            found = await asyncio.shield(future)
        except TimeoutError:
            self.ends["timeout"] += 1
            raise
        except ProcessEnded as error:
            self.ends["ended"] += 1
            logging.error("a process ended with exit code %s; another one is started", *error.args)
            raise
        except UserError:
            self._start_again_later()
            raise
        self._failures = 0
        return found

    def _start_again_later(self) -> None:
        if self.now.error is None or self._again is not None:
            return
        seconds = min(self._pause * 2**self._failures, LONGEST_PAUSE)
        self._failures += 1
        self.ends["not started"] += 1
        logging.error("%s; they are started again in %g s", self.now.error, seconds)
        self._again = asyncio.get_running_loop().call_later(seconds, self._start_again)

    def _start_again(self) -> None:
        self._again = None
        self.now.close()
        self.now = self._start()


class ScorerProcesses:
    """Run `count` processes that each make the `rewards`. A call that takes longer than `timeout`
    seconds is ended, with its process. UserError where the rewards cannot be made."""

    def __init__(
        self,
        rewards: tuple[RewardConfig, ...],
        count: int,
        timeout: float,
        *,
        pause: float = PAUSE,
    ):
        self.count = count
        self.names = labels(rewards)
        self._timeout = timeout
        # The processes divide the cores among them.
        threads = max(1, (os.cpu_count() or 1) // count)
        start = functools.partial(
            Processes,
            scorer_process.start,
            (rewards, threads),
            workers=count,
            start_timeout=START_TIMEOUT,
            what=f"reward {', '.join(self.names)}",
        )
        self._processes = Renewed(start, pause=pause)
        try:
            self._processes.now.call(worker.check, lambda: ([],)).result()
        except BaseException:
            self.close()
            raise

    @property
    def ends(self) -> dict[str, int]:
        return self._processes.ends

    def ready(self) -> int:
        return self._processes.now.ready()

    async def score(
        self,
        files: Sequence[np.ndarray],
        size: tuple[int, int],
        prompts: Sequence[str],
        metadata: Sequence[bytes],
    ) -> tuple[list[scorer_process.ImageScore], float]:
        arguments = (files, size, prompts, metadata)
        return await self._processes.call(scorer_process.score, lambda: arguments, self._timeout)

    def close(self) -> None:
        self._processes.now.close()


class RequestParser:
    """Parse bodies of requests: those of up to `small` bytes in a thread, others in a process."""

    def __init__(self, max_pixels: int, *, small: int = 1 << 20):
        self._max_pixels = max_pixels
        self._small = small
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "parser")
        # One large body at a time: each takes many times its size while it is parsed.
        self._turn = asyncio.Lock()

    @functools.cached_property
    def _process(self) -> Renewed:
        """Start the process, when the first large body arrives."""
        start = functools.partial(
            Processes,
            requests.start,
            (),
            workers=1,
            start_timeout=START_TIMEOUT,
            what="the parser",
        )
        return Renewed(start)

    async def parse(self, body: bytearray) -> requests.ScoreRequest:
        """Parse as `requests.parse_request` does, and empty `body`. Raises Refused."""
        if len(body) <= self._small:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(
                self._thread, requests.parse_request, body, self._max_pixels
            )
        else:
            found = await self._parse_in_process(body)
        body.clear()
        return found

    async def _parse_in_process(self, body: bytearray) -> requests.ScoreRequest:
        wanted = [body]
        task = asyncio.get_running_loop().create_task(self._in_turn(wanted))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            wanted.clear()  # frees the body, which is not parsed any more
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            raise

    async def _in_turn(self, wanted: list[bytearray]) -> requests.ScoreRequest:
        def arguments() -> tuple:
            return np.frombuffer(wanted.pop(), np.uint8), self._max_pixels  # sent without a copy

        async with self._turn:
            if not wanted:  # the client has left
                raise asyncio.CancelledError
            return await self._call(arguments)

    async def _call(self, arguments: Callable[[], tuple]) -> requests.ScoreRequest:
        try:
            return await self._process.call(requests.parse_array, arguments, PARSE_TIMEOUT)
        except TimeoutError:
            raise Refused(413, f"the body takes more than {PARSE_TIMEOUT:g} s to parse") from None
        except ProcessEnded as error:
            line = f"the process that parsed the body ended (exit code {error.args[0]})"
            raise Refused(500, line) from None
        except Refused:
            raise
        except UserError as error:
            raise Refused(503, str(error)) from None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if "_process" in self.__dict__:
            self._process.now.close()
