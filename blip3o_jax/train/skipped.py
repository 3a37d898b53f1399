"""Count skipped records over all hosts without waiting for any of them.

Each host publishes its counts of a batch before it dispatches the step on it. The metrics of a step
depend on the devices of all hosts, so that once one host has them, the others have published.
"""

import collections
import json
from collections.abc import Mapping, Sequence

from blip3o_jax.parallel import distributed

# Number of changes to store: a host may have dispatched the step after the one whose metrics
# another host waits for, and have fetched one more batch.
_STORED = 8


class SkippedRecords:
    """Count skipped records by kind of reason. `rows`: the rows of the batch that this host reads;
    hosts that read the same rows, along mesh axes that do not divide the batch, count once.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self._group = min(rows, default=-1)
        self._history: list[tuple[int, dict[str, int]]] = []  # (batch, counts from it on)

    def add(self, batch: int, counts: Mapping[str, int]) -> None:
        """Take this host's counts up to a batch, in ascending order; publish them if they differ
        from those before."""
        if self._history and self._history[-1][1] == counts:
            return
        self._history = [*self._history, (batch, dict(counts))][-_STORED:]
        if distributed.process_count() > 1:
            text = json.dumps([self._group, self._history])
            distributed.set_key(f"skipped/{distributed.process_index()}", text)

    def total(self, batch: int) -> dict[str, int]:
        """Return the counts of all hosts up to a batch whose step is done."""
        groups = {self._group: self._history}
        if distributed.process_count() > 1:
            published = distributed.read_keys("skipped")
            # The lowest host of a group counts: host 0 continues the checkpoint's counts.
            hosts = sorted(published, key=int, reverse=True)
            groups = dict(json.loads(published[host]) for host in hosts)
        counts: collections.Counter[str] = collections.Counter()
        for history in groups.values():
            counts.update(next((found for n, found in reversed(history) if n <= batch), {}))
        return dict(counts)
