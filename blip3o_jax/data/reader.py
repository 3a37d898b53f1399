"""Read records and turn them into rows. Unusable records are skipped, and the row reports them.

record id (source, index) -> record -> transform -> row
BadRecord -> the next record, see `_RecordSearch`
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
# A row's report of the records skipped for it: JSON in ASCII, at most this many bytes.
_REPORT_BYTES = 4096


class BadRecordLimit(UserError):
    """Report that more records than data.max_bad_fraction allows could not be used."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Read `data.pack` record ids (source, index) as one row: the transform's arrays, joined where
    there are several.

    These arrays are added:

        bad_records  int32 [] or [E]  records skipped for each example because they cannot be read
        _shards      int64 [] or [E]  CRC-32 of the name of the shard that each example was read
                                      from
        _skipped     bytes            a report on the records skipped, the too long ones included
    """

    sources: tuple[Source, ...]
    transform: Transform
    join: Join | None
    too_long: str

    def __call__(self, record_ids: Sequence[tuple[int, int]]) -> dict[str, Any]:
        searches = [
            _RecordSearch(self, self.sources[source], index) for source, index in record_ids
        ]
        found = [search.next() for search in searches]
        while True:
            try:
                [*rows], [*records] = zip(*found, strict=True)
                row = (
                    rows[0]
                    if self.join is None or len(record_ids) == 1
                    else self.join(rows, records)
                )
                break
            except RowTooLong as error:
                # Of the examples that would share the row, the longest is replaced.
                record = records[error.which]
                reason = f"shares a row that {error.reason}"
                searches[error.which].skip(BadRecord(record.shard, record.key, reason, TOO_LONG))
                found[error.which] = searches[error.which].next()
        skipped = [record for search in searches for record in search.skipped]
        bad = [sum(record.kind != TOO_LONG for record in search.skipped) for search in searches]
        shards = [zlib.crc32(_shard_name(record.shard).encode()) for record in records]
        # Scalars without packing: batches then have [B], not [B, 1].
        one = (lambda values: values[0]) if len(record_ids) == 1 else (lambda values: values)
        return row | {
            "bad_records": np.array(one(bad), np.int32),
            "_shards": np.array(one(shards), np.int64),
            "_skipped": pack_report(skipped),
        }


class _RecordSearch:
    """Find usable records of a source from `start` on, and collect the skipped ones."""

    def __init__(self, reader: Reader, source: Source, start: int) -> None:
        self._reader = reader
        self._source = source
        self._start = start
        self._tried = 0
        self.skipped: list[BadRecord] = []

    def next(self) -> tuple[Row, Record]:
        """Return the next usable record and its row. Raises BadRecordLimit if none is found."""
        limit = min(len(self._source), MAX_SKIPPED)
        while self._tried < limit:
            index = self._index()
            self._tried += 1
            try:
                return read_record(self._source, index, self._with_row)
            except BadRecord as error:
                self.skip(error)
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
