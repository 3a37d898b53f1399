"""Identity of data sets: one index file a shard, with a checksum of each record and a digest of all
of them.

A shard is a file of records: a tar, a parquet or ArrayRecord file, the captions.jsonl of a folder.
Indexing reads every byte of its records once. After that, opening a set compares the sizes of its
shards and reads their indexes; the checksum of a record is compared each time the record is read.
Of small shards the times of change are compared too, and what differs is read again: tar rounds
sizes to 10 KiB, so that they tell little.

    DIRECTORY OF THE SHARD/.blip3o_index/NAME.index      or, where nothing can be written there,
    USER'S CACHE/blip3o_jax/index/HASH-NAME.index        HASH of the shard's absolute path

The index lies beside the data so that a copy of the data takes it along, and in one hidden
directory so that listings and globs of the data stay as they are. File names, directories and times
are no part of the identity.

An index file has the layout of data/checked_file.py, with these arrays:

| array            | meaning                                                                       |
| ---------------- | ----------------------------------------------------------------------------- |
| crc u4 [N]       | CRC32C of the bytes of record n, its parts one after the other                |
| sizes i8 [N, M]  | sizes of its M parts; -1: there is none, or it could not be read              |
| keys u1, key_ends i8 [N] | names of the records, joined; both empty where the shard has none     |
| others           | where the records lie, as each format needs it                                |

digest of a shard  sha256 over the four arrays above, in that order, each after its number of bytes
digest of a set    sha256 over its kind and the digests of its shards in their order
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax import files
from blip3o_jax.checksums import crc32c
from blip3o_jax.config import ConfigError, UserError
from blip3o_jax.config.fields import escaped
from blip3o_jax.data import record as record_lib
from blip3o_jax.data.checked_file import (
    DamagedArrays,
    cache_directory,
    pack,
    unpack,
)
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
THREADS = 16  # records lie apart: the wait is for the disk
# Which shards to index again, besides those whose index is missing or out of date.
CHANGED, ALL = "changed", "all"
# Bytes read again at opening, at most, where modification times differ from those of indexing.
REBUILD_LIMIT = 256 * 2**20
LARGE_DATASET = 20 * 2**30  # bytes; to index more than that is better done before a run


@dataclasses.dataclass
class Counts:
    """Counts by reason, each with the place of the first occurrence."""

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


@dataclasses.dataclass
class IndexData:
    """The contents of a shard's index before it is written. `arrays` are those of the table above;
    `extra` holds further values that the format needs."""

    arrays: dict[str, np.ndarray]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    unused: Counts = dataclasses.field(default_factory=Counts)
    incomplete: Counts = dataclasses.field(default_factory=Counts)


def concatenate_keys(keys: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Return the arrays `keys` and `key_ends`."""
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    return {"keys": np.frombuffer(b"".join(keys), np.uint8), "key_ends": ends}


def printable(raw: bytes) -> str:
    """Return a file name as text for messages and JSON."""
    return escaped(raw.decode("utf-8", "backslashreplace"))


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The index of one shard, mapped into memory: worker processes share it."""

    arrays: dict[str, np.ndarray]
    header: dict[str, Any]

    def __len__(self) -> int:
        return len(self.arrays["crc"])

    def key(self, row: int) -> str:
        """Return the name of a record, fit for a line of text; bytes that are no UTF-8 are written
        as \\xNN."""
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
            sha.update(array)
        return sha.hexdigest()


def file_state(path: str) -> dict[str, Any]:
    """Return what opening compares of a shard's file. All shards are files today: an object store's
    etag would go here."""
    return {"size": os.stat(path).st_size}


def same_state(path: str, index: ShardIndex) -> str:
    """Return why an index is not of the file as it is now; "" where it is."""
    before, now = index.header["state"], file_state(path)
    return "" if before == now else f"its size was {before.get('size')}, now it is {now['size']}"


@dataclasses.dataclass(frozen=True)
class ShardFormat:
    """How the shards of one kind are indexed.

    Args:
      kind: of shard; part of the set's digest.
      build: reads all of a shard; calls `Progress.add` with the bytes that it has read. UserError
        refuses the shard.
      changed: why an index is not of the shard as it is now, "" where it is; opening a set asks it
        for every shard.
      state: what `changed` compares with.
      variant: what else decides what the index says.
      threads: shards that are read at once.
      size: bytes that `build` will read.
      extra: keys of `IndexData.extra`.
      one_file: nothing is read but the shard itself.
    """

    kind: str
    build: Callable[[str, "Progress"], IndexData]
    changed: Callable[[str, ShardIndex], str] = same_state
    state: Callable[[str], dict[str, Any]] = file_state
    variant: str = ""
    threads: int = THREADS
    size: Callable[[str], int] = os.path.getsize
    extra: frozenset[str] = frozenset()
    one_file: bool = True


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """The processes that open the same data set at once: this one's index, their count and a
    barrier that returns once all of them have called it."""

    index: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None


class _Cancelled(Exception):
    """Another shard was refused, or Ctrl-C was pressed: indexing stops."""


class Progress:
    """Lines on stderr about bytes read, every few seconds."""

    EVERY = 5.0  # seconds

    def __init__(self, name: str, shards: int, total: int, *, quiet: bool, hint: str) -> None:
        self.name, self.total, self.quiet = name, total, quiet
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._done, self._shards, self._of = 0, 0, shards
        self._began = time.monotonic()
        self._next = self._began + self.EVERY
        if total > LARGE_DATASET and hint:
            self._print(
                f"{name}: no index yet: {_size(total)} are read once now; before a long run on "
                f"accelerators, `{hint}` does that on any machine"
            )

    def add(self, count: int) -> None:
        """Count bytes; raise _Cancelled where the work is of no use any more. To be called with 0 now
        and then where much is done between two reads."""
        if self.cancelled.is_set():
            raise _Cancelled
        with self._lock:
            self._done += count
            self._report()

    def end_shard(self) -> None:
        with self._lock:
            self._shards += 1

    def _report(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self.EVERY
        rate = self._done / (now - self._began)
        left = f"{max(0, self.total - self._done) / rate:.0f} s" if rate else "unknown yet"
        self._print(
            f"indexing {self.name}: {self._shards}/{self._of} shards, {_size(self._done)} of "
            f"{_size(self.total)}, {_size(rate)}/s, ETA {left}"
        )

    def _print(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def _size(count: float) -> str:
    power = next((n for n in (1, 2, 3) if count < 1000 * 1024**n), 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


@dataclasses.dataclass(frozen=True)
class IndexFile:
    """An index file as it was when the data set was opened. It is memory-mapped when a record of it
    is read: each mapping holds a file descriptor, and a data set may have thousands of shards."""

    path: pathlib.Path
    records: int
    header: dict[str, Any]


class DatasetIndex:
    """The indexes of a set's shards behind one numbering of its records. It pickles: a worker
    process maps the same files.

    Attributes:
      digest: of the content of the set, 64 hexadecimal digits.
      ends: where the records of each shard end.
      unused, incomplete: what the shards hold beside whole records.
      extra: by shard, `IndexData.extra`.
      records: by shard, all that its file holds.
    """

    def __init__(
        self,
        command: str,
        kind: str,
        found: Sequence[IndexFile],
        ranges: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._command = command  # that indexes the set
        self._files = [(str(each.path), each.header["digest"]) for each in found]
        self.extra = [each.header["extra"] for each in found]
        self.records = [each.records for each in found]
        whole = [(0, each.records) for each in found]
        self._ranges = list(ranges) or whole
        self.ends = np.cumsum([take for _, take in self._ranges]).tolist()
        self.unused, self.incomplete = Counts(), Counts()
        for each in found:
            self.unused.merge(Counts.from_json(each.header["unused"]))
            self.incomplete.merge(Counts.from_json(each.header["incomplete"]))
        digests = [digest for _, digest in self._files]
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
        """Raise BadRecord of kind CHANGED unless the bytes of a record are those that were indexed."""
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
    """A source of shards with their index. `unused`: {reason why a member is not used: its
    description}."""

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
    """Map an index file. Raises ConfigError where it is not the one of opening: that is not the
    fault of the record to be read, which therefore is not skipped for it."""
    try:
        header, arrays = unpack(path, check=False)  # which was looked at when the set was opened
        if header.get("digest") == digest:
            return ShardIndex(arrays, header)
        reason = "it was rewritten"
    except (OSError, DamagedArrays) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise ConfigError(f"{path}: the index changed while in use ({reason}): start the command again")


def open_index(
    name: str,
    shards: Sequence[str],
    shard_format: ShardFormat,
    *,
    ranges: Sequence[tuple[int, int]] = (),
    processes: ProcessGroup = ProcessGroup(),
    rebuild: str = "",
    options: str = "",
) -> DatasetIndex:
    """Return the index of a set; make it first, or the part of it that is missing or out of date.

    Args:
      name: of the set, the path that the user gave.
      ranges: (first record, records) of each shard; all of them by default.
      processes: each reads some of the shards that have no index; they see each other's work where they
        share the directory.
      rebuild: which shards are read though they have an index: CHANGED are those whose time of change
        is another.
      options: of `blip3o data index`, beside the name.

    Raises:
      UserError: a shard cannot be part of a set, or its index can be written nowhere.
    """
    command = " ".join(filter(None, ("blip3o data index", shlex.quote(name), options)))
    found, reasons = _load_indexes(shards, shard_format, rebuild)
    if reasons and processes.index == 0:
        more = f" (and {len(reasons) - 1} more shards)" if len(reasons) > 1 else ""
        print(f"{name}: rebuilding the index: {reasons[0]}{more}", file=sys.stderr, flush=True)
    before = list(found)
    if modified := [] if rebuild else _modified_shards(shards, shard_format, found):
        rebuild = CHANGED
        for number in modified:
            found[number] = None

    def build(numbers: Iterable[int]) -> None:
        missing = [number for number in numbers if found[number] is None]
        total = sum(shard_format.size(shards[number]) for number in missing)
        quiet, hint = processes.index > 0, "" if rebuild else command
        progress = Progress(name, len(missing), total, quiet=quiet, hint=hint)
        _build_indexes(shards, missing, shard_format, found, rebuild, progress)

    if processes.count > 1:
        with contextlib.suppress(UserError, OSError):  # every host meets it below
            build(range(processes.index, len(shards), processes.count))
        processes.barrier()
    build(range(len(shards)))
    digest = lambda each: each.header["digest"]
    changed = [shards[i] for i in modified if digest(found[i]) != digest(before[i])]
    if changed and processes.index == 0:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        line = f"{name}: rebuilt the index: {changed[0]}{more} changed without another size"
        print(line, file=sys.stderr, flush=True)
    for shard, each, (skip, take) in zip(shards, found, ranges, strict=False):
        if skip + take > each.records:
            wanted = f"{skip + take} are wanted: fetch it again"
            raise UserError(f"{shard}: holds {each.records} records, {wanted}")
    return DatasetIndex(command, shard_format.kind, found, ranges)


def _load_indexes(
    shards: Sequence[str],
    shard_format: ShardFormat,
    rebuild: str,
) -> tuple[list[IndexFile | None], list[str]]:
    """Return the indexes that are there and right, and why others are not."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        both = list(pool.map(lambda shard: _load_index(shard, shard_format, rebuild), shards))
    return [index for index, _ in both], [reason for _, reason in both if reason]


def _load_index(
    shard: str, shard_format: ShardFormat, rebuild: str = ""
) -> tuple[IndexFile | None, str]:
    reason = ""
    for path in () if rebuild == ALL else _index_paths(shard, shard_format):
        try:
            header, arrays = unpack(path)
            index = ShardIndex(arrays, header)
            _check_layout(index, shard_format)
            changed = shard_format.changed(shard, index)
        except FileNotFoundError:
            continue
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
        ) as error:  # an index may come from anywhere
            why = getattr(error, "strerror", None) or error
            reason = f"{path}: the index cannot be used ({why})"
            continue
        if not changed and rebuild == CHANGED:
            if not shard_format.one_file:
                changed = "files beside it may have changed"
            elif header["mtime_ns"] != os.stat(shard).st_mtime_ns:
                changed = "its time of change is another"
        if not changed:
            return IndexFile(path, len(index), header), ""
        reason = f"{shard}: {changed}"
    return None, reason


def _modified_shards(
    shards: Sequence[str], shard_format: ShardFormat, found: Sequence[Any]
) -> list[int]:
    """Return the shards whose time of change is not that of indexing, unless they are too large to
    be read at opening."""
    if not shard_format.one_file:
        return []
    stats = [os.stat(shard) for shard in shards]
    numbers = [
        number
        for number, (index, now) in enumerate(zip(found, stats, strict=True))
        if index and index.header["mtime_ns"] != now.st_mtime_ns
    ]
    return numbers if sum(stats[i].st_size for i in numbers) <= REBUILD_LIMIT else []


def _check_layout(index: ShardIndex, shard_format: ShardFormat) -> None:
    """Raise DamagedArrays unless the arrays fit each other: the file may come from anywhere."""
    arrays, header = index.arrays, index.header
    try:
        count, (rows, _) = len(arrays["crc"]), arrays["sizes"].shape
        ends = arrays["key_ends"]
        fits = rows == count and len(ends) in (0, count)
        fits = fits and (header["version"], header["kind"]) == (VERSION, shard_format.kind)
        fits = (
            fits
            and header["variant"] == shard_format.variant
            and header["digest"] == index.digest()
        )
        fits = fits and header.keys() >= {"state", "unused", "incomplete", "mtime_ns"}
        fits = fits and header["extra"].keys() >= shard_format.extra
        for name in ("unused", "incomplete"):
            Counts.from_json(header[name])
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        fits = False
    if not fits:
        raise DamagedArrays("it is of another version, or its parts do not fit each other")


def _index_paths(shard: str, shard_format: ShardFormat) -> Iterator[pathlib.Path]:
    """Yield where the index of a shard may lie."""
    path = os.path.abspath(shard)
    suffix = (
        f".{hashlib.sha256(shard_format.variant.encode()).hexdigest()[:8]}"
        if shard_format.variant
        else ""
    )
    name = f"{os.path.basename(path)}{suffix}.index"
    if len(os.fsencode(name)) > 200:  # with the ending of a partial file it must stay below 255
        name = f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.index"
    yield pathlib.Path(os.path.dirname(path), DIRECTORY, name)
    place = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    yield cache_directory() / "index" / f"{place}-{name}"


def _build_indexes(
    shards: Sequence[str],
    missing: Sequence[int],
    shard_format: ShardFormat,
    found: list[Any],
    rebuild: str,
    progress: Progress,
) -> None:
    """Index the shards numbered `missing` and put what comes out into `found`."""

    def build(number: int) -> None:
        # Another host or run may have made it since.
        shard = shards[number]
        found[number] = _load_index(shard, shard_format, rebuild)[0] or _build_index(
            shard, shard_format, progress
        )
        progress.end_shard()

    with concurrent.futures.ThreadPoolExecutor(shard_format.threads) as pool:
        tasks = [pool.submit(build, number) for number in missing]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        except BaseException:
            progress.cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build_index(shard: str, shard_format: ShardFormat, progress: Progress) -> IndexFile:
    try:
        # Before its bytes: a change meanwhile is seen next time.
        state, mtime = shard_format.state(shard), os.stat(shard).st_mtime_ns
        built = shard_format.build(shard, progress)
    except OSError as error:
        reason = error.strerror or error
        if error.filename not in (None, shard):  # a file beside it
            reason = files.describe(error)
        raise UserError(f"{shard}: cannot be read: {reason}") from None
    header = {
        "version": VERSION,
        "kind": shard_format.kind,
        "variant": shard_format.variant,
        "state": state,
        "mtime_ns": mtime,
        "extra": built.extra,
        "unused": built.unused.by_reason,
        "incomplete": built.incomplete.by_reason,
    }
    header["digest"] = ShardIndex(built.arrays, header).digest()
    data, errors = pack(header, built.arrays), []
    for path in _index_paths(shard, shard_format):
        try:
            files.replace_bytes(path, data, shared=True)
            return IndexFile(path, len(built.arrays["crc"]), json.loads(json.dumps(header)))
        except OSError as error:
            errors.append(f"{path.parent}: {error.strerror}")
    tried = "; ".join(errors)
    hint = "make room or set XDG_CACHE_HOME"
    raise UserError(f"{shard}: its index can be written nowhere ({tried}): {hint}")
