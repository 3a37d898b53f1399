"""Build the index of a data set, reading every byte of its shards once, and load indexes built
before.

Opening a data set (`open_index`) loads the index of each shard from the shard's directory or from
the user's cache, and builds the ones that are missing or out of date.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from blip3o_jax import files
from blip3o_jax import progress as progress_lib
from blip3o_jax.config import UserError
from blip3o_jax.data.checked_file import DamagedArrays, pack, unpack
from blip3o_jax.data.index import DIRECTORY, VERSION, Counts, DatasetIndex, IndexFile, ShardIndex

THREADS = 16  # records are far apart on the disk: most time is spent waiting for it

# Which shards to index again, besides those whose index is missing or out of date.
CHANGED = "changed"
ALL = "all"

# Bytes read again at opening, at most, where modification times differ from those of indexing.
REBUILD_LIMIT = 256 * 2**20

LARGE_DATASET = 20 * 2**30  # bytes; to index more than that is better done before a run


@dataclasses.dataclass
class IndexData:
    """Hold the contents of a shard's index before it is written. `arrays` are those of the table in
    data/index.py; `extra` holds further values that the format needs.
    """

    arrays: dict[str, np.ndarray]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    unused: Counts = dataclasses.field(default_factory=Counts)
    incomplete: Counts = dataclasses.field(default_factory=Counts)


def file_state(path: str) -> dict[str, Any]:
    """Return the state of a shard's file that opening a data set compares. All shards are local
    files; the etag of an object store would go here.
    """
    return {"size": os.stat(path).st_size}


def same_state(path: str, index: ShardIndex) -> str:
    """Return why the index does not describe the file in its present state; "" if it does."""
    before = index.header["state"]
    now = file_state(path)
    return "" if before == now else f"its size was {before.get('size')}, now it is {now['size']}"


@dataclasses.dataclass(frozen=True)
class ShardFormat:
    """Describe how the shards of one kind are indexed.

    Args:
      kind: name of the kind; part of the set's digest.
      build: reads all of a shard, calling `IndexProgress.add` with the number of bytes read. Raises
        UserError for a shard that cannot be used.
      changed: returns why the index does not describe the shard in its present state, "" if it
        does; called for every shard when a set is opened.
      state: returns the state that `changed` compares.
      variant: further settings that the contents of the index depend on.
      threads: number of shards that are read at once.
      size: returns the number of bytes that `build` will read.
      extra: keys of `IndexData.extra`.
      one_file: whether only the shard itself is read, no other file.
    """

    kind: str
    build: Callable[[str, "IndexProgress"], IndexData]
    changed: Callable[[str, ShardIndex], str] = same_state
    state: Callable[[str], dict[str, Any]] = file_state
    variant: str = ""
    threads: int = THREADS
    size: Callable[[str], int] = os.path.getsize
    extra: frozenset[str] = frozenset()
    one_file: bool = True


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """Describe the processes that open the same data set at once: this one's index, their count,
    and a barrier that returns once all of them have called it.
    """

    index: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None


class _Cancelled(Exception):
    """Signal that indexing stops: another shard cannot be used, or Ctrl-C was pressed."""


class IndexProgress:
    """Show the bytes read of a set's shards; `cancelled` ends the work."""

    def __init__(self, name: str, shards: int, total: int, *, quiet: bool, hint: str) -> None:
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._shards = 0
        self._of = shards
        self._began = time.monotonic()
        if total > LARGE_DATASET and hint and not quiet:
            line = (
                f"{name}: no index yet: {_size(total)} are read once now; before a long run on "
                f"accelerators, `{hint}` does that on any machine"
            )
            print(line, file=sys.stderr, flush=True)
        self._shown = progress_lib.Progress(f"index {name}", total, amount=_size, shown=not quiet)

    def add(self, count: int) -> None:
        """Count bytes read. Raises _Cancelled once indexing is to stop; long work between two reads
        calls this with 0 to find out.
        """
        if self.cancelled.is_set():
            raise _Cancelled
        with self._lock:
            done = self._shown.done + count
            rate = done / max(1e-9, time.monotonic() - self._began)
            shards = f"{self._shards}/{self._of} shards"
            self._shown.update(done, f"{_size(rate)}/s", shards)

    def end_shard(self) -> None:
        with self._lock:
            self._shards += 1

    def close(self) -> None:
        self._shown.close()


def _size(count: float) -> str:
    power = next((n for n in (1, 2, 3) if count < 1000 * 1024**n), 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


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
    """Return the index of a set, building what is missing or out of date.

    Args:
      name: the path of the set as the user gave it.
      shards: the paths of its files.
      shard_format: how a file of the set is divided into records.
      ranges: (first record, number of records) of each shard; all records by default.
      processes: each of them indexes part of the shards that have no index, and finds the others'
        work where they share the directory.
      rebuild: which shards are read again although they have an index; CHANGED: those whose
        modification time differs.
      options: options of `blip3o data index` after the name, for messages.

    Raises:
      UserError: a shard cannot be used, or its index cannot be written anywhere.
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
        quiet = processes.index > 0
        hint = "" if rebuild else command
        progress = IndexProgress(name, len(missing), total, quiet=quiet, hint=hint)
        with contextlib.closing(progress):
            _build_indexes(shards, missing, shard_format, found, rebuild, progress)

    if processes.count > 1:
        with contextlib.suppress(UserError, OSError):  # raised again below, on every host
            build(range(processes.index, len(shards), processes.count))
        processes.barrier()
    build(range(len(shards)))
    built = [each for each in found if each is not None]  # all of them now
    changed = []
    for i in modified:
        old = before[i]
        if old is None or old.header["digest"] != built[i].header["digest"]:
            changed.append(shards[i])
    if changed and processes.index == 0:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        line = f"{name}: rebuilt the index: {changed[0]}{more} changed without another size"
        print(line, file=sys.stderr, flush=True)
    for shard, each, (skip, take) in zip(shards, built, ranges, strict=False):
        if skip + take > each.records:
            wanted = f"{skip + take} are wanted: fetch it again"
            raise UserError(f"{shard}: holds {each.records} records, {wanted}")
    reused = sum(each is not None for each in before) - len(modified)
    return DatasetIndex(command, shard_format.kind, built, ranges, reused)


def _load_indexes(
    shards: Sequence[str],
    shard_format: ShardFormat,
    rebuild: str,
) -> tuple[list[IndexFile | None], list[str]]:
    """Return the valid indexes (None for the others), and why an index that is there cannot be
    used.
    """
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
            # An index of another format is not damaged; `build` refuses a shard of that format.
            if header["kind"] != shard_format.kind:
                continue
            index = ShardIndex(arrays, header)
            _check_layout(index, shard_format)
            changed = shard_format.changed(shard, index)
        except FileNotFoundError:
            continue
        # An index may come from an untrusted source: its header can hold any values.
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            why = getattr(error, "strerror", None) or error
            reason = f"{path}: the index cannot be used ({why})"
            continue
        if not changed and rebuild == CHANGED:
            if not shard_format.one_file:
                changed = "the files that it names may have changed"
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
    arrays = index.arrays
    header = index.header
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
    yield files.cache_directory() / "index" / f"{place}-{name}"


def _build_indexes(
    shards: Sequence[str],
    missing: Sequence[int],
    shard_format: ShardFormat,
    found: list[Any],
    rebuild: str,
    progress: IndexProgress,
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
            # The other threads stop at their next `IndexProgress.add`.
            progress.cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build_index(shard: str, shard_format: ShardFormat, progress: IndexProgress) -> IndexFile:
    try:
        # Before its bytes: a change meanwhile is seen next time.
        state = shard_format.state(shard)
        mtime = os.stat(shard).st_mtime_ns
        built = shard_format.build(shard, progress)
    except OSError as error:
        reason = error.strerror or error
        if error.filename not in (None, shard):  # another file, such as an image
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
    data = pack(header, built.arrays)
    errors = []
    for path in _index_paths(shard, shard_format):
        try:
            files.replace_bytes(path, data, shared=True)
            return IndexFile(path, len(built.arrays["crc"]), json.loads(json.dumps(header)))
        except OSError as error:
            errors.append(f"{path.parent}: {error.strerror}")
    tried = "; ".join(errors)
    hint = "make room or set XDG_CACHE_HOME"
    raise UserError(f"{shard}: its index can be written nowhere ({tried}): {hint}")
