"""Plan which examples share a row, from their lengths alone, before anything is read.

    endless order of record ids -> windows of consecutive ones -> rows of at most E

The rows of a window are a function of (seed, group, window, lengths): every host computes the same
plan, reads its own rows only, and the position in the stream is the number of a window and the
number of its rows that are done.

Within a window the longest examples are placed first, each in the row with the most room (the LPT
rule: longest processing time first, Graham 1969), over the smallest number of rows that holds all
of them with at most E each. First fit by decreasing length, the usual rule of sequence packing,
needs as few tokens, but it fills its first rows by length with fewer than E examples: their slots
of the diffusion head are then computed for nothing.
"""

import bisect
import collections
import heapq
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Examples of a window, for up to four a row. Over 1,024 the longest and the shortest balance: 256
# leave up to 5 % more of the slots empty, 4,096 at most 0.2 % fewer.
_WINDOW = 1024
_ROWS = 256  # rows of a window of larger ones, so that one that is not full weighs little
_LARGEST_WINDOW = 65536
# Windows whose rows a process keeps: a batch of several windows is read in the order of its rows.
_KEPT_WINDOWS = 64

RecordId = tuple[int, int]  # source, index


class RowIds(NamedTuple):
    """Hold the record ids of a row: those planned for its slots, then those that no slot is planned
    for, since they cannot be read or are too long; the reader tries these to report them. `after`:
    the position (group, window, rows done) after the batch of the row, () without packing.
    """

    records: tuple[RecordId, ...]
    after: tuple[int, ...] = ()


def window_size(pack: int) -> int:
    """Return the number of examples of a window for `pack` of them a row."""
    return min(_LARGEST_WINDOW, max(_WINDOW, _ROWS * pack))


class Position(NamedTuple):
    """Hold the position in a group of sources: rows that are done of a window, and the number of
    the group's batches before.
    """

    window: int = 0
    rows: int = 0
    batches: int = 0


class PackedRows:
    """Number the rows of one group's endless sequence of record ids, from a position on.

    Args:
      record_ids: record id by number.
      lengths: tokens of each record, by source. 0 marks one that cannot be read.
      order: what the order of a window's rows is sampled from, such as (seed, group); None keeps
        the order of each row's first example.
    """

    def __init__(
        self,
        record_ids: Any,
        lengths: Sequence[np.ndarray],
        max_length: int,
        pack: int,
        order: tuple[int, ...] | None,
        start: Position = Position(),
    ) -> None:
        self._record_ids = record_ids
        self._lengths = lengths
        self._max_length = max_length
        self._pack = pack
        self._order = order
        self._first_window = start.window
        # Row numbers at which windows begin, from the first window on; rows done are negative.
        self._begins = [-start.rows]
        self._kept: collections.OrderedDict[int, list[tuple[RecordId, ...]]]
        self._kept = collections.OrderedDict()
        self._lock = threading.Lock()  # Grain's threads share the rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __getitem__(self, row: int) -> tuple[RecordId, ...]:
        """Return the record ids of a row, those without a slot last."""
        with self._lock:
            window, number = self._find(row)
            return self._rows(window)[number]

    def position(self, row: int) -> tuple[int, int]:
        """Return (window, its rows done) after a row."""
        with self._lock:
            window, number = self._find(row)
            return window, number + 1

    def _find(self, row: int) -> tuple[int, int]:
        """Return (window, number of the row in it)."""
        while self._begins[-1] <= row:
            window = self._first_window + len(self._begins) - 1
            self._begins.append(self._begins[-1] + len(self._rows(window)))
        index = bisect.bisect_right(self._begins, row) - 1
        return self._first_window + index, row - self._begins[index]

    def _rows(self, window: int) -> list[tuple[RecordId, ...]]:
        if window not in self._kept:
            self._kept[window] = self._plan(window)
            if len(self._kept) > _KEPT_WINDOWS:
                self._kept.popitem(last=False)
        return self._kept[window]

    def _plan(self, window: int) -> list[tuple[RecordId, ...]]:
        size = window_size(self._pack)
        ids = [self._record_ids[n] for n in range(window * size, (window + 1) * size)]
        lengths = [int(self._lengths[source][index]) for source, index in ids]
        usable = [n for n, length in enumerate(lengths) if 0 < length <= self._max_length]
        packed = pack_window([lengths[n] for n in usable], self._max_length, self._pack)
        rows = sorted(sorted(usable[n] for n in row) for row in packed)
        if self._order is not None:
            # Packing sorts by length, which batches must not be.
            shuffled = np.random.default_rng((*self._order, window)).permutation(len(rows))
            rows = [rows[n] for n in shuffled]
        # A window of which nothing is usable has one row, in which its records are reported.
        rows = rows or [[]]
        for number, n in enumerate(sorted(set(range(size)) - set(usable))):
            rows[number % len(rows)].append(n)
        return [tuple(ids[n] for n in row) for row in rows]


def pack_window(lengths: Sequence[int], max_length: int, pack: int) -> list[list[int]]:
    """Return rows of at most `pack` indices into `lengths` whose sums are at most `max_length`.
    Every index is in one row, the longest first. Lengths must lie between 1 and `max_length`.
    """
    # Stable: equal lengths keep the order of the window.
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    fewest = max(-(-len(lengths) // pack), -(-sum(lengths) // max_length))
    # The number of rows is searched for by doubling steps, then by halving: it is nearly always
    # `fewest` or one more.
    too_few = fewest - 1
    count = fewest
    step = 1
    while (rows := _place_longest_first(lengths, longest_first, count, max_length, pack)) is None:
        too_few = count
        count = min(len(lengths), count + step)
        step *= 2
    while count - too_few > 1:
        middle = (too_few + count) // 2
        fewer = _place_longest_first(lengths, longest_first, middle, max_length, pack)
        if fewer is None:
            too_few = middle
        else:
            rows, count = fewer, middle
    return rows


def _place_longest_first(
    lengths: Sequence[int], longest_first: Sequence[int], count: int, max_length: int, pack: int
) -> list[list[int]] | None:
    """Return `count` rows, each example put into the one with the most room; None if one does not
    fit there.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]  # (tokens, row) of rows with an empty slot
    for index in longest_first:
        if not heap:
            return None
        tokens, number = heap[0]
        tokens += lengths[index]
        if tokens > max_length:
            return None
        rows[number].append(index)
        if len(rows[number]) < pack:
            heapq.heapreplace(heap, (tokens, number))
        else:
            heapq.heappop(heap)
    return rows
