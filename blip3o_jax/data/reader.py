"""Read records and turn them into rows. Unusable records are skipped, and the row reports them.

record ids (source, index) of a row -> records -> transform -> join -> row
BadRecord of a row's last usable record -> the next record, see `_RecordSearch`
"""

import dataclasses
import itertools
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.data.packing import RowIds
from blip3o_jax.data.record import (
    TOO_LONG,
    BadRecord,
    Record,
    RowTooLong,
    Source,
    one_line,
    read_record,
)

Row = dict[str, np.ndarray]
Transform = Callable[[Record], Row]
Join = Callable[[Sequence[Row], Sequence[Record]], Row]

# As many unusable records end the search for a usable one: the next NEIGHBOURS of the source, then
# some from all over it, since a damaged file spoils all records that lie in it. With nine records
# of ten unusable, one search in 10^5 fails.
MAX_SKIPPED = 128
NEIGHBOURS = 16
REPORT_FIELDS = ("seen", "unreadable", "shards", "skipped")
_NO_SLOT = "has {length} examples, a row has slots for {max_length}"
# A row's report of the records skipped for it: JSON in ASCII, at most this many bytes.
_REPORT_BYTES = 4096


class BadRecordLimit(UserError):
    """Report that more records than data.max_bad_fraction allows could not be used."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Read the records of a row: the transform's arrays, joined where up to E examples share it. A
    record that cannot be used leaves its slot empty; a row of which no record can be used takes the
    next usable record of the source.

    These arrays are added:

        bad_records  int32 [] or [E]  records skipped because they cannot be read; [0] has all
        _after       int64 [3]        the row's `after`, with packing

    and a report, for the loader, under the names of REPORT_FIELDS with "_" before them:

        seen         int32            records of the row
        unreadable   int32            those of them that cannot be read
        shards       int64 [] or [E]  CRC-32 of the name of the shard that each example was read
                                      from; of the first example in empty slots
        skipped      bytes            on the records skipped, the too long ones included
    """

    sources: tuple[Source, ...]
    transform: Transform
    join: Join | None
    too_long: str
    pack: int = 1

    def __call__(self, row: RowIds) -> dict[str, Any]:
        searches = [
            _RecordSearch(self, self.sources[source], index) for source, index in row.records
        ]
        found = [(search, *one) for search in searches if (one := search.try_one()) is not None]
        unreadable = sum(bool(search.bad()) for search in searches)
        if not found:
            found = [(searches[0], *searches[0].next())]
        arrays = self._joined(found)
        skipped = [record for search in searches for record in search.skipped]
        bad = sum(search.bad() for search in searches)
        shards = [zlib.crc32(_shard_name(record.shard).encode()) for _, _, record in found]
        report = {
            "_seen": np.array(len(searches), np.int32),
            "_unreadable": np.array(unreadable, np.int32),
            "_skipped": pack_report(skipped),
        }
        if self.pack == 1:  # scalars: batches then have [B], not [B, 1]
            return (
                arrays
                | {
                    "bad_records": np.array(bad, np.int32),
                    "_shards": np.array(shards[0], np.int64),
                }
                | report
            )
        empty = self.pack - len(found)
        return (
            arrays
            | {
                "bad_records": np.array([bad, *[0] * (self.pack - 1)], np.int32),
                "_shards": np.array(shards + shards[:1] * empty, np.int64),
                "_after": np.array(row.after, np.int64),
            }
            | report
        )

    def _joined(self, found: list[tuple["_RecordSearch", Row, Record]]) -> Row:
        """Return the arrays of the row; `found` loses what does not fit in it."""
        if self.join is None or self.pack == 1:
            return found[0][1]
        while True:
            _, rows, records = zip(*found, strict=True)
            try:
                if len(rows) > self.pack:
                    raise RowTooLong(records[-1].key, len(rows), self.pack, _NO_SLOT)
                return self.join(rows, records)
            except RowTooLong as error:
                # A record without a slot, since it could not be read when the rows were planned.
                # Not `skip`, which may end the run: no text is too long.
                search, _, record = found.pop()
                reason = f"shares a row that {error.reason}"
                search.skipped.append(BadRecord(record.shard, record.key, reason, TOO_LONG))


class _RecordSearch:
    """Find usable records of a source from `start` on, and collect the skipped ones."""

    def __init__(self, reader: Reader, source: Source, start: int) -> None:
        self._reader = reader
        self._source = source
        self._start = start
        self._tried = 0
        self.skipped: list[BadRecord] = []

    def try_one(self) -> tuple[Row, Record] | None:
        """Return the next record to try, at first that at the start, and its row; None if it cannot
        be used.
        """
        index = self._index()
        self._tried += 1
        try:
            return read_record(self._source, index, self._with_row)
        except BadRecord as error:
            self.skip(error)
            return None

    def next(self) -> tuple[Row, Record]:
        """Return the next usable record and its row. Raises BadRecordLimit if none is found."""
        limit = min(len(self._source), MAX_SKIPPED)
        while self._tried < limit:
            if (found := self.try_one()) is not None:
                return found
        last = _describe(self.skipped[-1])
        raise BadRecordLimit(
            f"{self._source.name}: {limit} records in a row cannot be used, the last {last}; "
            + (
                "raise data.max_length"
                if self.skipped[-1].kind == TOO_LONG
                else "repair the data set"
            )
        )

    def _with_row(self, record: Record) -> tuple[Row, Record]:
        return self._reader.transform(record), record

    def _index(self) -> int:
        size = len(self._source)
        if self._tried < NEIGHBOURS or size <= MAX_SKIPPED:
            return (self._start + self._tried) % size
        # Steps of the golden section leave no stretch of the source out for long. Coprime with
        # the size, they come to no record twice before they have come to all.
        near = round(0.618 * size)
        step = next(step for step in itertools.count(near) if math.gcd(step, size) == 1)
        return (self._start + (self._tried - NEIGHBOURS + 1) * step) % size

    def bad(self) -> int:
        """Return how many of the skipped records cannot be read."""
        return sum(record.kind != TOO_LONG for record in self.skipped)

    def skip(self, record: BadRecord) -> None:
        if record.kind == TOO_LONG and self._reader.too_long == "error":
            raise UserError(
                f"{_describe(record)}: shorten its text, raise data.max_length, or set"
                " data.too_long to skip or truncate"
            )
        self.skipped.append(record)


def _describe(record: BadRecord) -> str:
    return f"{one_line(record.shard)}: {one_line(record.key)}: {one_line(record.reason, 300)}"


def pack_report(skipped: list[BadRecord]) -> np.ndarray:
    """Return a report as JSON in a fixed number of bytes, so that rows stack and cross processes:
    how many records were skipped for each kind of reason, and the last ones (shard, key, reason,
    kind).
    """
    if not skipped:
        return np.array(b"", f"S{_REPORT_BYTES}")
    counts = Counter(one_line(record.kind, 60) for record in skipped)
    if len(counts) > 20:
        counts = Counter({"several": sum(counts.values())})
    names = [
        (_shard_name(r.shard), one_line(r.key[-150:]), one_line(r.reason), one_line(r.kind, 60))
        for r in skipped
    ]
    # The last ones are kept: the first of them go until the report fits.
    while len(text := json.dumps([counts, names]).encode("ascii")) > _REPORT_BYTES:
        # What is printed in one character may take twelve bytes here.
        names = names[1:] or [_halved(names[0])]
    return np.array(text, f"S{_REPORT_BYTES}")


def _halved(parts: tuple[str, str, str, str]) -> tuple[str, str, str, str]:
    shard, key, reason, kind = (part[: len(part) // 2] for part in parts)
    return shard, key, reason, kind


def _shard_name(shard: str) -> str:
    return one_line(shard[-150:])
