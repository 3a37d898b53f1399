"""Detect lost hosts: the others report which one and where it was, and end with its status.

    a host that ends       publishes the reason --> the others, which wait for that key, end
                           GRACE_SECONDS later
    a host that is killed  stops its heartbeat --> the others compare heartbeats when a collective
                           fails, and when jax.distributed declares a host dead: after
                           RUNTIME_TIMEOUT, for host 0 at once

Without this module, jax.distributed aborts the others with a stack trace and status 134 (SIGABRT).
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

HEARTBEAT_PERIOD = 3.0  # seconds between a host's heartbeats
STALE = 3 * HEARTBEAT_PERIOD  # seconds without a new heartbeat after which a host is lost
ANSWER_SECONDS = 3.0  # seconds for host 0 to answer with the others' heartbeats
GRACE_SECONDS = 5.0  # seconds for a host to end by itself
# Seconds; a C++ thread sends jax.distributed's heartbeats, so that Python cannot delay them.
RUNTIME_TIMEOUT = 60
_ENDED = "blip3o/ended"
_HEARTBEATS = "blip3o/heartbeats"
_STOPPING = "blip3o/stopping"  # set once a host has received SIGTERM
_DAY = 24 * 3600 * 1000  # milliseconds


class LostHost(exits.RunEnded):
    """Report that another host has ended, without which this one cannot go on."""

    def __init__(self, host: int, where: str, status: int, why: str = ""):
        how = (
            f"was lost{where}"
            if status == exits.LOST_PEER
            else f"ended with status {status}{where}{why}"
        )
        super().__init__(f"host {host} {how}; the same command goes on from the last checkpoint")
        self.status = status


class LostConnection(exits.RunEnded):
    """Report that hosts that are all alive cannot reach each other."""

    def __init__(self, why: str):
        super().__init__(
            f"the connection between the hosts failed ({why}); the same command goes on from the "
            "last checkpoint"
        )
        self.status = exits.LOST_PEER


class Peers:
    """Watch the other hosts of a job. `client` is that of `jax.distributed`."""

    def __init__(self, client: Any, host: int, hosts: int):
        self._client = client
        self._host = host
        self._hosts = hosts
        self.phase = "start"
        self.step = 0
        # The last heartbeat of host 0, whose process stores those of all hosts.
        self._host0_heartbeat: list[Any] = []
        # On host 0: each host's last heartbeat, and the time it was first seen.
        self._seen: dict[int, tuple[list[Any], float]] = {}
        self._ended: LostHost | None = None
        self._notified = threading.Event()
        self._closed = threading.Event()

    def start(self) -> None:
        self._listener = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._listener.start()
        threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True).start()
        self._catch_abort()

    def close(self) -> None:
        """Stop watching: all hosts are done."""
        self._closed.set()
        with contextlib.suppress(RuntimeError):  # another host was faster
            self._client.key_value_set(_ENDED, "")
        self._listener.join(GRACE_SECONDS)

    def notify_peers(self, status: int, line: str) -> None:
        """Notify the other hosts that this one ends."""
        value = json.dumps([self._host, status, self.phase, self.step])
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(_ENDED, value)
            time.sleep(1.0 if self._host == 0 else 0.0)  # the others read it from this process

    def announce_stop(self) -> None:
        """Publish, without waiting, that this host received SIGTERM and a step will be saved."""

        def announce() -> None:
            with contextlib.suppress(RuntimeError):
                self._client.key_value_set(_STOPPING, "", allow_overwrite=True)

        threading.Thread(target=announce, daemon=True).start()

    def is_stop_announced(self) -> bool:
        """Return whether any host has received SIGTERM; False if host 0 does not answer."""
        found: list[str] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                found.append(self._client.key_value_try_get(_STOPPING))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS)
        return bool(found)

    def lost(self) -> LostHost | None:
        """Return a host whose heartbeat has not changed within STALE seconds, or None."""
        if (before := self._read_heartbeats()) is None:
            return self._ended or self._unanswered()
        # Until the second reading is due, or a host has said why it ended.
        if self._notified.wait(STALE):
            return self._ended
        if (after := self._read_heartbeats()) is None:
            return self._unanswered()
        others = [host for host in range(self._hosts) if host != self._host]
        stale = [host for host in others if before.get(host) == after.get(host)]
        return self._lost_host(stale[0], after.get(stale[0], [])) if stale else None

    def _unanswered(self) -> LostHost | None:
        """Return the lost host if the store does not answer.

        It is host 0, which keeps the store. On host 0 itself jax.distributed has closed the client,
        after another host's heartbeat stopped: the host whose last one is the oldest.
        """
        if self._host:
            return self._lost_host(0, self._host0_heartbeat)
        if not self._seen:
            return None
        host, (heartbeat, at) = min(self._seen.items(), key=lambda item: item[1][1])
        return self._lost_host(host, heartbeat) if time.monotonic() - at >= STALE else None

    def _lost_host(self, host: int, heartbeat: list[Any]) -> LostHost:
        return LostHost(
            host, f" in {heartbeat[1]} at step {heartbeat[2]}" if heartbeat else "", exits.LOST_PEER
        )

    def _send_heartbeats(self) -> None:
        for count in range(2**62):
            with contextlib.suppress(RuntimeError, ValueError):
                heartbeat = json.dumps([count, self.phase, self.step])
                self._client.key_value_set(
                    f"{_HEARTBEATS}/{self._host}", heartbeat, allow_overwrite=True
                )
                if self._host:
                    self._host0_heartbeat = json.loads(
                        self._client.key_value_try_get(f"{_HEARTBEATS}/0")
                    )
                else:
                    self._note(self._client.key_value_dir_get(f"{_HEARTBEATS}/"))
            if self._closed.wait(HEARTBEAT_PERIOD):
                return

    def _note(self, stored: list[tuple[str, str]]) -> None:
        for host, heartbeat in _by_host(stored).items():
            known = self._seen.get(host)
            if host != self._host and (known is None or known[0] != heartbeat):
                self._seen[host] = (heartbeat, time.monotonic())

    def _read_heartbeats(self) -> dict[int, list[Any]] | None:
        """Return the last heartbeat of each host, or None if host 0 does not answer."""
        found: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                found.append(self._client.key_value_dir_get(f"{_HEARTBEATS}/"))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS)
        return _by_host(found[0]) if found else None

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                value = self._client.blocking_key_value_get(_ENDED, _DAY)
            except RuntimeError as error:
                # The wait has a maximum, after which it starts again.
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                return  # host 0 is gone, which jax.distributed sees too
            if not value or self._closed.is_set():
                return
            host, status, phase, step = json.loads(value)
            if host != self._host:
                self._ended = LostHost(host, f" in {phase} at step {step}", status)
                self._notified.set()
                # The main thread may end by itself meanwhile, and closes its files then.
                time.sleep(GRACE_SECONDS)
                exits.process.end(self._ended)
            return

    def _catch_abort(self) -> None:
        """Turn SIGABRT of jax.distributed into the message and status of a lost host.

        The handler is a C function: Python's own handlers run in the main thread, which is blocked
        waiting for the lost host.
        """
        libc = ctypes.CDLL(None)
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
        libc.signal.argtypes = [ctypes.c_int, handler]
        libc.signal.restype = ctypes.c_void_p

        def aborted(number: int) -> None:
            error = self._ended or self.lost()
            if error is not None:
                exits.process.end(error)
            # The status of a process that SIGABRT ends.
            os._exit(128 + number)

        self._handler = handler(aborted)  # kept, as C keeps no reference
        libc.signal(signal.SIGABRT, self._handler)


def _by_host(stored: list[tuple[str, str]]) -> dict[int, list[Any]]:
    """Return the heartbeats by host from the keys and values of the store."""
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in stored}


@contextlib.contextmanager
def without_stack_trace() -> Iterator[None]:
    """Make `jax.distributed.initialize` create a client that aborts without a stack trace.

    The default callback for missed heartbeats logs one and aborts. The callback that replaces it
    aborts too, but is never called: the bindings of JAX 0.10 to 0.12 cannot convert its argument,
    and abort with two lines.
    """
    from jax._src import distributed

    module = distributed._jax
    make = module.get_distributed_runtime_client
    module.get_distributed_runtime_client = lambda *args, **kwargs: make(
        *args, missed_heartbeat_callback=lambda status: os.abort(), **kwargs
    )
    try:
        yield
    finally:
        module.get_distributed_runtime_client = make
