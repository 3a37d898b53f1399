"""Identify data sets by their content: one index file per shard, with a checksum of each record,
and a digest of all of them.

A shard is a file of records: a tar, a parquet or ArrayRecord file, the captions.jsonl of a folder.
Indexing reads every byte of its records once. After that, opening a set compares the sizes of its
shards and reads their indexes; the checksum of a record is compared each time the record is read.
For small shards the modification times are compared too, and shards with another time are read
again: tar rounds sizes to 10 KiB, so that an edited shard may keep its size.

    DIRECTORY OF THE SHARD/.blip3o_index/NAME.index      or, where that cannot be written,
    USER'S CACHE/blip3o_jax/index/HASH-NAME.index        HASH of the shard's absolute path

The index is in the data's directory so that a copy of the data includes it, and in one hidden
directory so that listings and globs of the data stay as they are. File names, directories and times
are not part of the identity.

An index file has the layout of data/checked_file.py, with these arrays:

    crc u4 [N]                 CRC32C of the bytes of record n, its parts one after the other
    sizes i8 [N, M]            sizes of its M parts; -1: there is none, or it cannot be read
    keys u1, key_ends i8 [N]   names of the records, joined; both empty where the shard has none
    others                     where the records lie, as each format needs it

    digest of a shard          sha256 over the four arrays above in the order keys, key_ends, sizes,
                               crc, each after its number of bytes
    digest of a set            sha256 over its kind and the digests of its shards in their order
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.checksums import crc32c
from blip3o_jax.config import ConfigError
from blip3o_jax.config.errors import escaped
from blip3o_jax.data import record as record_lib
from blip3o_jax.data.checked_file import DamagedArrays, unpack
from blip3o_jax.data.record import BadRecord, Source

VERSION = 2  # raised whenever an array or the digest changes its meaning

IDENTITY = ("keys", "key_ends", "sizes", "crc")

DIRECTORY = ".blip3o_index"

INCOMPLETE = {  # name in metrics: description in messages
    "no_caption": "without a caption",
    "no_image": "without an image",
    "empty_image": "with an empty image",
    "unreadable": "that cannot be read",
}


@dataclasses.dataclass
class Counts:
    """Hold counts by reason, each with the place of the first occurrence."""

    by_reason: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, by_reason: dict[str, list[Any]]) -> "Counts":
        """Return the counts in the header of an index. Raises ValueError, TypeError or
        AttributeError if they are malformed: the file may come from anywhere."""
        counts = {}
        for reason, (count, first) in by_reason.items():
            if int(count) < 0:
                raise ValueError(f"{count} {reason}")
            counts[escaped(reason)] = (int(count), escaped(str(first)))
        return cls(counts)

    def add(self, reason: str, where: str, count: int = 1) -> None:
        before, first = self.by_reason.get(reason, (0, where))
        self.by_reason[reason] = (before + count, first)

    def merge(self, other: "Counts") -> None:
        for reason, (count, first) in other.by_reason.items():
            self.add(reason, first, count)

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.by_reason.values())

    def describe(self, names: Mapping[str, str]) -> str:
        """Return each reason by its name with its count and its first occurrence."""
        ordered = sorted(self.by_reason.items())
        each = (f"{count} {names.get(name, name)} ({first})" for name, (count, first) in ordered)
        return ", ".join(each)


def concatenate_keys(keys: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Return the arrays `keys` and `key_ends`."""
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    return {"keys": np.frombuffer(b"".join(keys), np.uint8), "key_ends": ends}


def printable(raw: bytes) -> str:
    """Return a file name as text for messages and JSON."""
    return escaped(raw.decode("utf-8", "backslashreplace"))


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Hold the index of one shard, mapped into memory: worker processes share it."""

    arrays: dict[str, np.ndarray]
    header: dict[str, Any]

    def __len__(self) -> int:
        return len(self.arrays["crc"])

    def key(self, row: int) -> str:
        r"""Return the name of a record on one line; bytes that are not UTF-8 become \xNN."""
        ends = self.arrays["key_ends"]
        if not len(ends):
            return ""
        raw = self.arrays["keys"][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes()
        return printable(raw)

    def digest(self) -> str:
        sha = hashlib.sha256()
        for name in IDENTITY:
            array = np.ascontiguousarray(self.arrays[name])
            sha.update(array.nbytes.to_bytes(8, "little"))
            sha.update(array.data)
        return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class IndexFile:
    """Hold an index file's state at the opening of the data set. The file is memory-mapped only
    when a record of it is read: each mapping holds a file descriptor, and a data set may have
    thousands of shards.
    """

    path: pathlib.Path
    records: int
    header: dict[str, Any]


class DatasetIndex:
    """Join the indexes of a set's shards into one numbering of its records. It pickles: a worker
    process maps the same files.

    Attributes:
      digest: of the content of the set, 64 hexadecimal digits.
      ends: by shard, the number of records up to its end.
      unused, incomplete: counts of the members that no record uses and of the incomplete records.
      extra: by shard, `IndexData.extra`.
      records: by shard, the number of records in its file.
      reused: the number of shards that were not read at this opening.
    """

    def __init__(
        self,
        command: str,
        kind: str,
        found: Sequence[IndexFile],
        ranges: Sequence[tuple[int, int]] = (),
        reused: int = 0,
    ) -> None:
        self.reused = reused
        self._command = command  # the command that indexes the set
        self._files = [(str(each.path), each.header["digest"]) for each in found]
        self.extra = [each.header["extra"] for each in found]
        self.records = [each.records for each in found]
        whole = [(0, each.records) for each in found]
        self._ranges = list(ranges) or whole
        self.ends = np.cumsum([take for _, take in self._ranges]).tolist()
        self.unused = Counts()
        self.incomplete = Counts()
        for each in found:
            self.unused.merge(Counts.from_json(each.header["unused"]))
            self.incomplete.merge(Counts.from_json(each.header["incomplete"]))
        digests = [digest for _, digest in self._files]
        # Left out for whole sets, so that train[:100%] and train have one digest.
        part = self._ranges if self._ranges != whole else []  # of a split such as train[:10]
        self.digest = hashlib.sha256(json.dumps([kind, digests, *part]).encode()).hexdigest()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the shard and the row in it of record `index`."""
        number = bisect.bisect_right(self.ends, index)
        before = self.ends[number - 1] if number else 0
        return number, self._ranges[number][0] + index - before

    def shard(self, number: int) -> ShardIndex:
        return _memory_map(*self._files[number])

    def check(self, shard: str, number: int, row: int, parts: Iterable[bytes], key: str) -> None:
        """Raise BadRecord of kind CHANGED unless the bytes of a record are those that were
        indexed.
        """
        arrays = self.shard(number).arrays
        if (arrays["sizes"][row] < 0).all():
            reason = "it could not be read when the set was indexed, now it can"
        elif crc32c(parts) != int(arrays["crc"][row]):
            reason = "its bytes are not those that were indexed"
        else:
            return
        hint = f"if the change is meant, `{self._command}` rebuilds the index"
        raise BadRecord(shard, key, f"{reason}; {hint}", record_lib.CHANGED)


class IndexedSource(Source):
    """Provide a source of shards with their index. `unused`: {reason why a member is not used: its
    description}.
    """

    def __init__(
        self,
        name: str,
        shards: Iterable[str],
        index: DatasetIndex,
        unused: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, shards)
        self._index = index
        self.unused = {reason: count for reason, (count, _) in index.unused.by_reason.items()}
        self.incomplete = index.incomplete.total
        self.reused = index.reused
        every = INCOMPLETE | dict(unused or {})
        self.notes = tuple(
            f"{name}: {counts.total} {what}: {counts.describe(every)}"
            for counts, what in (
                (index.unused, "members not used"),
                (index.incomplete, f"of {len(index)} records incomplete"),
            )
            if counts.total
        )

    @property
    def fingerprint(self) -> str:
        return self._index.digest

    def __len__(self) -> int:
        return len(self._index)


@functools.lru_cache(maxsize=256)  # each mapping holds a file descriptor
def _memory_map(path: str, digest: str) -> ShardIndex:
    """Map an index file. Raises ConfigError where the file is no longer the one found at opening;
    the record is not skipped for it, since the record itself is sound.
    """
    try:
        header, arrays = unpack(path, check=False)  # its checksum was compared at opening
        if header.get("digest") == digest:
            return ShardIndex(arrays, header)
        reason = "it was rewritten"
    except (OSError, DamagedArrays) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise ConfigError(f"{path}: the index changed while in use ({reason}): start the command again")
