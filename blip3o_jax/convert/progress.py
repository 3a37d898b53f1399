"""Print the progress of a conversion every few seconds on standard error."""

import sys
import time

INTERVAL = 5.0  # seconds


class Progress:
    """Print `verb` ("read", "write") and the bytes of `total` that are done."""

    def __init__(self, verb: str, total: int):
        self.verb, self.total, self.done = verb, total, 0
        self._began = self._last = time.monotonic()

    def advance(self, part: str, count: int) -> None:
        """Count `count` more bytes, of `part`."""
        self.done += count
        now = time.monotonic()
        if now - self._last < INTERVAL:
            return
        self._last = now
        rate = self.done / 1e9 / max(now - self._began, 1e-9)
        left = (self.total - self.done) / 1e9 / max(rate, 1e-9)
        done = f"{self.done / 1e9:.3g}/{self.total / 1e9:.3g} GB"
        print(f"{self.verb}  {part}  {done}  {rate:.2f} GB/s  ETA {left:.0f} s", file=sys.stderr)
