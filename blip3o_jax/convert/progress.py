"""Show the progress of a conversion in bytes."""

import time

from blip3o_jax.progress import Progress


class ByteProgress(Progress):
    """Show `verb` ("read", "write"), the bytes done of `total`, the ETA, the rate and the part."""

    def __init__(self, verb: str, total: int):
        super().__init__(verb, total, amount=lambda size: f"{size / 1e9:.2f}", after="GB")
        self._since = time.monotonic()

    def add(self, part: str, size: int) -> None:
        """Add `size` bytes of `part`."""
        rate = (self.done + size) / 1e9 / max(time.monotonic() - self._since, 1e-9)
        self.advance(size, f"{rate:.2f} GB/s", part)
