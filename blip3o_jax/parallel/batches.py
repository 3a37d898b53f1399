"""Place the rows of a batch that each host reads on its devices.

rows of this host (data/loader.py) -> global arrays, sharded over the batch axis
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from blip3o_jax.data.loader import Loader

# Seconds that a thread may take to end when the loader is closed.
SHUTDOWN_TIMEOUT = 10.0


def host_rows(sharding: jax.sharding.Sharding, batch_rows: int) -> list[int]:
    """Return the rows of a global batch that `sharding` (over the batch axis) puts on this host's
    devices.

    On a torus they need not be adjacent, and each of several hosts that share a row (along mesh
    axes `tensor`, `sequence`) reads it.
    """
    spans = sharding.addressable_devices_indices_map((batch_rows,)).values()
    # None stands for no index: JAX gives one for an array that has an axis.
    indices = [index[0].indices(batch_rows) for index in spans if index is not None]
    return sorted({row for index in indices for row in range(*index)})


def global_batch(
    host_batch: dict[str, Any],
    sharding: jax.sharding.Sharding,
    rows: Sequence[int],
    batch_rows: int,
) -> dict[str, Any]:
    """Return global arrays [batch_rows, ...], sharded by `sharding`; this host provides `rows`."""
    first = {row: position for position, row in enumerate(rows)}

    def globally(values: np.ndarray) -> Any:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_rows)
            return values[first[start] : first[start] + stop - start]

        return jax.make_array_from_callback((batch_rows, *values.shape[1:]), sharding, shard)

    return {name: globally(values) for name, values in host_batch.items()}


class DevicePrefetch(Iterator[dict[str, Any]]):
    """Prefetch up to `depth` of the loader's batches as global arrays in a background thread.

    `wait_seconds` is how long the last `next` waited for data, `state()` the position after the
    batch it returned.
    """

    def __init__(self, loader: Loader, sharding: jax.sharding.Sharding, depth: int = 2) -> None:
        self._loader = loader
        self._sharding = sharding
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        # Before the thread starts: it moves the loader on.
        self._state = loader.state()
        self.wait_seconds = 0.0
        self._thread = threading.Thread(target=self._fill, name="device-prefetch", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        while not self._stop.is_set():
            try:
                loader = self._loader
                item: tuple[dict[str, Any] | Exception, dict[str, Any] | None] = (
                    global_batch(next(loader), self._sharding, loader.rows, loader.batch_rows),
                    loader.state(),
                )
            except Exception as error:  # raised again where the batch is awaited
                item = (error, None)
                self._stop.set()
            self._queue.put(item)

    def __next__(self) -> dict[str, Any]:
        began = time.perf_counter()
        batch, state = self._queue.get()
        if state is None:
            # Put back, so that every later call raises the same error.
            self._queue.put((batch, state))
            raise batch
        self._state = state
        self.wait_seconds = time.perf_counter() - began
        return batch

    def state(self) -> dict[str, Any]:
        return self._state

    def close(self) -> None:
        """End the thread and the loader's workers; prefetched batches are dropped.

        A thread that hangs in a read is abandoned after SHUTDOWN_TIMEOUT seconds: it is a daemon.
        """
        self._stop.set()
        end = time.monotonic() + SHUTDOWN_TIMEOUT
        while self._thread.is_alive() and time.monotonic() < end:
            while not self._queue.empty():  # the thread may be waiting for room
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)
        self._loader.close()
