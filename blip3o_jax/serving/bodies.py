"""Read the bodies of requests within limits of length, time and memory."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterator
from typing import Any

from starlette.requests import ClientDisconnect, Request

from blip3o_jax.serving.connections import ConnectionLimits
from blip3o_jax.serving.refused import Refused


class MemoryBudget:
    """Bound the bytes that all current requests take together. An eighth of `size` is for requests
    of up to `small` bytes only. Not thread-safe: use it in one event loop."""

    def __init__(self, size: int, small: int = 1 << 20):
        self.size = size
        self.reserved = 0
        self._small = small

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes for a `with` block. Raises Refused (503) if too few are free."""
        # The reserve for small requests: a few large bodies must not lock out health checks and
        # small clients.
        limit = self.size if size <= self._small else self.size - self.size // 8
        if self.reserved + size > limit:
            raise Refused(503, "the current requests take all the memory: try again later")
        self.reserved += size
        try:
            yield
        finally:
            self.reserved -= size


def content_length(request: Request, largest: int) -> int:
    """Return the length in bytes that the headers give. Raises Refused: 411 without a
    Content-Length, 400 if it is not a number, 413 if it exceeds `largest`."""
    length = request.headers.get("content-length")
    # A chunked body has no length in advance, for which memory could be reserved.
    if length is None or "transfer-encoding" in request.headers:
        raise Refused(411, "send the body in one piece, with its Content-Length")
    if not (length.isascii() and length.isdigit()):
        raise Refused(400, "Content-Length is not a number")
    # The number of digits first: Python refuses to convert more than 4300.
    if len(length) > 15 or int(length) > largest:
        raise Refused(413, f"the body is longer than {largest} bytes")
    return int(length)


async def read_body(request: Request, limits: ConnectionLimits) -> bytearray:
    """Read the whole body. Raises Refused (408) after `body_seconds` or `idle_seconds` without a
    piece, and ClientDisconnect if the client leaves."""
    body = bytearray()
    pieces = aiter(request.stream())
    try:
        # Two deadlines: the inner one for a client that has stopped, the outer one for a client
        # that sends a byte at a time.
        async with asyncio.timeout(limits.body_seconds):
            while True:
                async with asyncio.timeout(limits.idle_seconds):
                    body += await anext(pieces)
    except StopAsyncIteration:
        return body
    except TimeoutError:
        raise Refused(
            408, f"the body did not come within {limits.body_seconds:g} s, or stopped coming"
        ) from None


async def unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """Return the result of `work`, or cancel it and raise ClientDisconnect once the client has
    left. The body must have been read."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        _drop(task)
        raise
    finally:
        left.cancel()
    if not task.done():
        _drop(task)
        raise ClientDisconnect
    return task.result()


def _drop(task: asyncio.Future) -> None:
    """Cancel work whose result is not needed. Log an error in it, unless it is a refusal."""

    def log(task: asyncio.Future) -> None:
        if not task.cancelled() and not isinstance(task.exception(), Refused | None):
            logging.error("dropped work failed", exc_info=task.exception())

    task.cancel()
    task.add_done_callback(log)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
