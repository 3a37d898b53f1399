"""Send the answer to one request, within the time that a client may take to read it."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from blip3o_jax.serving.connections import ConnectionLimits


class ClientStuck(Exception):
    """Signal that a client does not read its answer."""


class Answer:
    """Wrap `receive` and `send` of one request: bound the time of each send, and close the
    connection after a refusal whose body is unread.

    It closes only once the body has been read and dropped, or after `linger_seconds`: the kernel
    resets a connection that is closed with unread data, and the client may lose the answer.
    """

    def __init__(
        self, scope: Mapping[str, Any], receive: Callable, send: Callable, limits: ConnectionLimits
    ):
        self._receive = receive
        self._send = send
        self._limits = limits
        names = {name for name, _ in scope["headers"]}
        self._unread = bool(names & {b"content-length", b"transfer-encoding"})
        self._closing = False
        self.status: int | None = None

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._closing = self._unread and self.status >= 400
            if self._closing:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
        elif self._closing and not message.get("more_body", False):
            # The answer is sent, but its end is held back while the rest of the body is read:
            # uvicorn closes the connection at the end.
            await self._bounded({**message, "more_body": True})
            if self.status != 408:  # this body has had its time already
                await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._bounded(message)

    async def _bounded(self, message: MutableMapping[str, Any]) -> None:
        """Send within `answer_seconds`. Raises ClientStuck."""
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                await self._send(message)
        except TimeoutError:
            raise ClientStuck from None

    async def _linger(self) -> None:
        """Read and drop the rest of the body, for up to `linger_seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.linger_seconds):
                while self._unread:
                    await self.receive()
