"""Hosts that are lost: the others say which one and where it was, and end with its status.

    a host that ends by itself    publishes why --> the others wait for that key, and end GRACE seconds later
    a host that is killed         its sign of life stands still --> looked at where a collective fails here, and where
                                  jax.distributed gives a host up: after HEARTBEAT seconds of silence, at once for host 0

Left to itself jax.distributed aborts the others, with a stack trace and status 134 (SIGABRT).
"""

import contextlib
import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from blip3o_jax import exits

PERIOD = 3.0  # seconds between a host's signs of life
STILL = 3 * PERIOD  # a host whose sign has not changed for so long is lost
ANSWER = 3.0  # seconds for host 0 to answer what the others' signs are
GRACE = 5.0  # seconds for a host to end of its own accord
HEARTBEAT = 60  # seconds; the heart of jax.distributed beats in a thread that neither a compile nor Python holds up
_ENDED, _ALIVE = "blip3o/ended", "blip3o/alive"
_DAY = 24 * 3600 * 1000  # milliseconds


class LostHost(exits.Ended):
    """Another host has ended; this one cannot go on."""

    def __init__(self, host: int, where: str, status: int, why: str = ""):
        how = (
            f"was lost{where}"
            if status == exits.LOST_PEER
            else f"ended with status {status}{where}{why}"
        )
        super().__init__(f"host {host} {how}; the same command goes on from the last checkpoint")
        self.status = status


class Peers:
    """The other hosts of a job, as this one sees them. `client` is that of `jax.distributed`."""

    def __init__(self, client: Any, host: int, hosts: int):
        self._client, self._host, self._hosts = client, host, hosts
        self.phase, self.step = "start", 0
        self._zero: list[Any] = []  # the last sign of host 0, which keeps all others'
        self._ended: LostHost | None = None
        self._news = threading.Event()
        self._over = threading.Event()

    def start(self) -> None:
        self._listener = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._listener.start()
        threading.Thread(target=self._beat, name="alive", daemon=True).start()
        self._catch_abort()

    def over(self) -> None:
        """All hosts are done: nobody is lost from here on."""
        self._over.set()
        with contextlib.suppress(RuntimeError):  # another host was faster
            self._client.key_value_set(_ENDED, "")
        self._listener.join(GRACE)

    def farewell(self, status: int, line: str) -> None:
        """Tells the others that this host ends."""
        value = json.dumps([self._host, status, self.phase, self.step])
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(_ENDED, value)
            time.sleep(1.0 if self._host == 0 else 0.0)  # they hear of it through this process

    def lost(self) -> LostHost | None:
        """Which host it is that cannot be reached any more; looks for STILL seconds, asking twice.
        None: all are there.
        """
        if (before := self._signs()) is None:
            return self._ended or self._gone(0, self._zero)
        if self._news.wait(STILL):
            return self._ended
        if (after := self._signs()) is None:
            return self._gone(0, self._zero)
        others = [host for host in range(self._hosts) if host != self._host]
        still = [host for host in others if before.get(host) == after.get(host)]
        return self._gone(still[0], after.get(still[0], [])) if still else None

    def _gone(self, host: int, sign: list[Any]) -> LostHost:
        return LostHost(host, f" in {sign[1]} at step {sign[2]}" if sign else "", exits.LOST_PEER)

    def _beat(self) -> None:
        for count in range(2**62):
            with contextlib.suppress(RuntimeError, ValueError):
                sign = json.dumps([count, self.phase, self.step])
                self._client.key_value_set(f"{_ALIVE}/{self._host}", sign, allow_overwrite=True)
                if self._host:
                    self._zero = json.loads(self._client.key_value_try_get(f"{_ALIVE}/0"))
            if self._over.wait(PERIOD):
                return

    def _signs(self) -> dict[int, list[Any]] | None:
        """The last sign of each host; None where host 0 does not answer."""
        found: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                found.append(self._client.key_value_dir_get(f"{_ALIVE}/"))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER)
        return (
            {int(key.rpartition("/")[2]): json.loads(value) for key, value in found[0]}
            if found
            else None
        )

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                value = self._client.blocking_key_value_get(_ENDED, _DAY)
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                return  # host 0 is gone, which jax.distributed sees too
            if not value or self._over.is_set():
                return
            host, status, phase, step = json.loads(value)
            if host != self._host:
                self._ended = LostHost(host, f" in {phase} at step {step}", status)
                self._news.set()
                time.sleep(GRACE)
                exits.process.end(self._ended)
            return

    def _catch_abort(self) -> None:
        """SIGABRT of jax.distributed becomes the line and status of a lost host. It comes in a
        thread of its own; Python's `signal` would wait for the main thread, which waits for the
        host that is lost.
        """
        libc = ctypes.CDLL(None)
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
        libc.signal.argtypes = [ctypes.c_int, handler]
        libc.signal.restype = ctypes.c_void_p

        def aborted(number: int) -> None:
            error = self._ended or self.lost()
            if error is not None:
                exits.process.end(error)
            os._exit(128 + number)

        self._handler = handler(aborted)  # kept, as C keeps no reference
        libc.signal(signal.SIGABRT, self._handler)


@contextlib.contextmanager
def without_stack_trace() -> Iterator[None]:
    """Have `jax.distributed.initialize` make a client that aborts in two lines, without a stack
    trace.

    A callback of ours takes the place of the default, which logs one. It is never called: the
    bindings of JAX 0.10 cannot convert its argument, and abort.
    """
    from jax._src import distributed

    module = distributed._jax
    make = module.get_distributed_runtime_client
    module.get_distributed_runtime_client = lambda *args, **kwargs: make(
        *args, missed_heartbeat_callback=lambda status: None, **kwargs
    )
    try:
        yield
    finally:
        module.get_distributed_runtime_client = make
