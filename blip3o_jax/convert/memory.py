"""Measure the peak resident memory of this process."""

import pathlib
import threading
from typing import Any

_STATM = pathlib.Path("/proc/self/statm")


def resident() -> int:
    """Return the bytes resident now, including pages of mapped files; 0 if unsupported."""
    try:
        import resource

        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except (OSError, ImportError):
        return 0


class PeakMemory:
    """Sample the resident memory during a block; `peak` is the maximum in bytes.

    The kernel's peak covers the whole process, not a block. `interval` is in seconds.
    """

    def __init__(self, interval: float = 0.005):
        self.peak = 0
        self._interval = interval
        self._stop = threading.Event()

    def __enter__(self) -> "PeakMemory":
        self.peak = resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident())

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, resident())
