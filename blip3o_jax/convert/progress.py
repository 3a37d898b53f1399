"""Print the progress of a conversion every few seconds on standard error."""

import sys
import time

INTERVAL = 5.0  # seconds


class Progress:
    """Print `verb` ("read", "write"), the bytes done of `total`, the rate and the ETA."""

    def __init__(self, verb: str, total: int):
        self.verb = verb
        self.total = total
        self.done = 0
        self._began = self._last = time.monotonic()

    def advance(self, part: str, count: int) -> None:
        """Add `count` bytes of `part`; print a line every INTERVAL seconds."""
        self.done += count
        now = time.monotonic()
        if now - self._last < INTERVAL:
            return
        self._last = now
        rate = self.done / 1e9 / max(now - self._began, 1e-9)
        left = (self.total - self.done) / 1e9 / max(rate, 1e-9)
        done = f"{self.done / 1e9:.3g}/{self.total / 1e9:.3g} GB"
        print(f"{self.verb}  {part}  {done}  {rate:.2f} GB/s  ETA {left:.0f} s", file=sys.stderr)
