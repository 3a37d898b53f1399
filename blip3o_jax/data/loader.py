"""Records -> batches: weighted mixture, seeded shuffle, worker processes, and a state of one
number.

    sources -> shuffle, repeat -> mix -> this host's rows -> read + transform -> batch -> workers     (Grain)

Example n of the run is a function of (seed, n) alone: neither the number of hosts nor that of
workers changes it. Row r of global batch k is example kG + r, for G = data.batch_size. A host reads
the rows that the batch's sharding puts on its devices, wherever the mesh has these, so the global
array is the same on any number of hosts and any mesh, and the position is one number, valid for all
of them.

A record that cannot be used (`BadRecord`: whatever exception it raises) has its row filled by the
next usable record of its source: a filter would make the position depend on what was filtered. The
row carries how many were skipped for it, and which, out of the worker process.
"""

import dataclasses
import functools
import json
import logging
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import DataConfig, UserError
from blip3o_jax.data.reader import BadRecordLimit, Join, Reader, Transform
from blip3o_jax.data.record import TOO_LONG, Source

HostBatch = dict[str, Any]  # arrays of the rows that this host reads

# Seconds that a thread may take to end.
ENDING = 10.0
# Records of one shard, all of them skipped for the same kind of reason, that are worth a warning.
FIRST_OF_SHARD = 8
# Too long records that are logged by name; captions of some data sets are long by the thousand.
LOGGED_TOO_LONG = 10
_log = logging.getLogger(__name__)


class Loader(Iterator[HostBatch]):
    """Endless batches: dicts of arrays [B, ...] with this host's B = len(rows) examples.

    Every batch has the transform's fields, the same in each row, and `bad_records` int32 [B] ([B,
    E] where E examples share a row): how many records were skipped to fill the row, the too long
    ones not counted. Each skipped record is logged once with shard, key and reason, of those that
    are too long the first few; `skipped` counts all by the kind of reason.

    Args:
      sources: with their weights, as `sources.open_mixture` gives them. Every stretch of examples keeps to the weights
        (to a hundredth of the smallest). Those of another `shape` come in batches of their own.
      transform: a record -> the arrays of one row. Any exception but ConfigError skips the record.
        It must pickle, and each host must give rows of the same shapes.
      data: batch_size, pack, workers, prefetch, shuffle, too_long and max_bad_fraction are used. With
        0 workers, threads do the work.
      rows: which rows of a global batch this host reads (`host_rows`); all by default.
      join: the arrays and records of `data.pack` examples that follow each other -> those of a row,
        or RowTooLong; needed above 1. It must pickle.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        transform: Transform,
        data: DataConfig,
        seed: int,
        *,
        rows: Sequence[int] | None = None,
        join: Join | None = None,
    ) -> None:
        self._sources, self._transform, self._data, self._seed = (
            list(sources),
            transform,
            data,
            seed,
        )
        self.batch_rows, self._join = data.batch_size // data.pack, join
        self.rows = tuple(range(self.batch_rows) if rows is None else rows)
        self._next_example = 0
        self._batches: Any = None
        self._records = sum(len(source) for source, _ in self._sources)
        self.skipped: Counter[str] = Counter()  # of this host's rows, by kind of reason
        self._seen = self._bad = self._too_long = 0
        self._logged: set[tuple[str, str]] = set()
        self._logged_too_long = 0
        self._warned = False  # of the fraction that is too long
        self._sound: set[int] = set()  # shards (CRC-32 of their names) of which a record was used
        self._suspects: dict[str, dict[str, str]] = {}  # other shards: key -> kind of reason
        self._last_skipped = ""
        self.wait_seconds = 0.0  # how long the last batch was waited for

    def __next__(self) -> HostBatch:
        began = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self._dataset())
        try:
            batch = dict(next(self._batches))
        except Exception:
            self.close()
            raise
        self._next_example += self._data.batch_size
        self._judge(batch["bad_records"], batch.pop("_shards"), batch.pop("_skipped"))
        self.wait_seconds = time.perf_counter() - began
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the last batch handed out, the same on every host but for "skipped",
        which counts what this one skipped; fit for JSON."""
        return {
            "next_example": self._next_example,
            "order": self._order(),
            "skipped": dict(self.skipped),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, on any number of hosts and workers, and with any batch
        size.

        Raises:
          UserError: the state belongs to another mixture, seed or order.
        """
        if changed := _changes(state["order"], self._order()):
            raise UserError(
                f"the data changed since the checkpoint: {changed}: resuming would repeat and leave out examples; restore "
                "what was there, or start in a new directory with checkpoint.init_from"
            )
        self.close()
        self._next_example = state["next_example"]
        self.skipped = Counter(state["skipped"])

    def close(self) -> None:
        """Ends worker processes and threads. Iterating again restarts them, at the same
        position.
        """
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _order(self) -> dict[str, Any]:
        """What decides which example comes when."""
        sources = [
            {
                "name": source.name,  # for messages: a copy elsewhere is the same data
                "digest": source.fingerprint,
                "records": len(source),
                "weight": weight,
                "shape": source.shape and list(source.shape),
            }
            for source, weight in self._sources
        ]
        order = {"seed": self._seed, "shuffle": self._data.shuffle, "sources": sources}
        return order | ({"batch_size": self._data.batch_size} if len(self._shapes()) > 1 else {})

    def _shapes(self) -> list[list[int]]:
        """Numbers of the sources whose images have the same shape."""
        groups: dict[Any, list[int]] = {}
        for number, (source, _) in enumerate(self._sources):
            groups.setdefault(source.shape, []).append(number)
        return list(groups.values())

    def _dataset(self) -> Any:
        import grain

        pack = self._data.pack
        places = _HostRows(
            self._places(), self._next_example, self._data.batch_size, self.rows, pack
        )
        reader = Reader(
            tuple(source for source, _ in self._sources),
            self._transform,
            self._join,
            self._data.too_long,
        )
        rows = (
            grain.MapDataset.source(places)
            .batch(pack, drop_remainder=True, batch_fn=tuple)
            .map(reader)
        )
        batches = rows.batch(len(self.rows), drop_remainder=True)
        workers = self._data.workers
        # The unit of prefetching is a batch. In a worker process one thread is enough: the
        # processes are the parallelism.
        depth = max(1, self._data.prefetch)
        threads = 1 if workers else depth
        dataset = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if workers:
            _mark_flags_parsed()
            options = grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=depth
            )
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        return dataset

    def _places(self) -> Any:
        """The endless sequence of (source, index) that all hosts draw from."""
        import grain

        # One seed a source, far apart: Grain shuffles epoch e with seed + e.
        seeds = np.random.SeedSequence(self._seed).generate_state(len(self._sources))

        def endless(number: int) -> Any:
            part = grain.MapDataset.range(len(self._sources[number][0]))
            if self._data.shuffle:
                part = part.shuffle(seed=int(seeds[number]))
            return part.repeat(None, reseed_each_epoch=self._data.shuffle).map(
                functools.partial(_place, number)
            )

        def mixed(numbers: list[int]) -> Any:
            parts = [endless(number) for number in numbers]
            return (
                grain.MapDataset.mix(parts, [self._sources[n][1] for n in numbers])
                if len(parts) > 1
                else parts[0]
            )

        groups = self._shapes()
        if len(groups) == 1:
            return mixed(groups[0])
        counts = [
            grain.MapDataset.range(sys.maxsize // 2**20).map(functools.partial(_place, g))
            for g in range(len(groups))
        ]
        turns = grain.MapDataset.mix(
            counts, [sum(self._sources[n][1] for n in numbers) for numbers in groups]
        )
        return _InTurns(turns, tuple(map(mixed, groups)), self._data.batch_size)

    def _judge(
        self, bad_records_B: np.ndarray, shards_B: np.ndarray, reports_B: np.ndarray
    ) -> None:
        """Count and log what was skipped; stop the run above the fraction allowed.

        The fraction is that of the examples whose own record cannot be read. What is skipped in the
        search for another says little of the set: where four neighbours are damaged, ten are
        skipped in an epoch.
        """
        self._seen += bad_records_B.size
        self._bad += int(np.count_nonzero(bad_records_B))
        self._sound.update(shards_B.ravel().tolist())
        reports_B = reports_B.ravel()
        for report in reports_B[reports_B != b""]:
            counts, records = json.loads(report)
            self.skipped.update(counts)
            self._too_long += counts.get(TOO_LONG, 0)
            for shard, key, reason, kind in records:
                self._log_skipped(shard, key, reason, kind)
        self._warn_of_too_long()
        allowed = self._data.max_bad_fraction
        if self._enough(allowed) and self._bad > allowed * self._seen:
            raise BadRecordLimit(
                f"{self._bad} of {self._seen} records ({self._bad / self._seen:.1%}) cannot be read, more than "
                f"data.max_bad_fraction={allowed:.1%}, the last {self._last_skipped}; repair the data set "
                "or raise that fraction"
            )

    def _enough(self, fraction: float) -> bool:
        """Return whether enough records were seen to tell `fraction` of them from chance: ten times
        its inverse, or the whole data set."""
        enough = min(self._records, max(100, math.ceil(10 / fraction))) if fraction > 0 else 0
        return self._seen >= enough

    def _log_skipped(self, shard: str, key: str, reason: str, kind: str) -> None:
        if kind != TOO_LONG:
            self._last_skipped = f"{shard}: {key}: {reason}"
        elif self._logged_too_long == LOGGED_TOO_LONG:
            return
        if (shard, key) not in self._logged:
            self._logged.add((shard, key))
            self._logged_too_long += kind == TOO_LONG
            _log.warning("skipped %s: %s: %s", shard, key, reason)
        if zlib.crc32(shard.encode()) in self._sound:
            self._suspects.pop(shard, None)
            return
        found = self._suspects.setdefault(shard, {})
        if key in found or len(found) == FIRST_OF_SHARD:
            return
        found[key] = kind
        if len(found) == FIRST_OF_SHARD and len(set(found.values())) == 1:
            _log.warning(
                "each of the first %d records read of %s was skipped: %s: look at that file",
                len(found),
                shard,
                reason,
            )

    def _warn_of_too_long(self) -> None:
        """Warn once if the fraction of too long records exceeds data.max_bad_fraction. The run goes
        on."""
        fraction = self._data.max_bad_fraction
        seen = self._seen + self._too_long
        if not self._warned and self._enough(fraction) and self._too_long > fraction * seen:
            self._warned = True
            _log.warning(
                "%d of %d records (%.1f%%) are longer than a row and were skipped, as data.too_long says: raise "
                "data.max_length, or set data.too_long=truncate; further ones are counted only",
                self._too_long,
                seen,
                100 * self._too_long / seen,
            )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what makes the order of examples another than that of a checkpoint; "" where it is the
    same.
    """
    found = [
        f"{name} was {before.get(name)}, now it is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name != "sources" and before.get(name) != now.get(name)
    ]
    old, new = before["sources"], now["sources"]
    digests = [[source["digest"] for source in sources] for sources in (old, new)]
    if len(old) != len(new):
        found.append(f"there were {len(old)} sources, now there are {len(new)}")
    elif sorted(digests[0]) == sorted(digests[1]) and digests[0] != digests[1]:
        listed = [", ".join(source["name"] for source in sources) for sources in (old, new)]
        found.append(f"the sources are in another order ({listed[0]} became {listed[1]})")
    else:
        found += filter(None, map(_source_change, old, new))
    return "; ".join(found)


def _source_change(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return how a source differs from that in the same place of the mixture before."""
    found = [
        f"its {name} was {old[name]}, now it is {new[name]}"
        for name in ("weight", "shape")
        if old[name] != new[name]
    ]
    if old["digest"] != new["digest"]:
        was = "" if old["name"] == new["name"] else f" ({old['name']} then)"
        found.insert(
            0, f"its content is another{was}, {old['records']} records then, {new['records']} now"
        )
    return f"source {new['name']}: {', '.join(found)}" if found else ""


def _place(source: int, index: int) -> tuple[int, int]:
    return source, index


@dataclasses.dataclass(frozen=True)
class _InTurns:
    """Places by example number: each batch takes the next ones of one group, and `turns` says of
    which.
    """

    turns: Any  # batch -> (group, how many batches it has had)
    groups: tuple[Any, ...]
    batch_size: int

    def __getitem__(self, example: int) -> tuple[int, int]:
        batch, row = divmod(example, self.batch_size)
        group, before = self.turns[batch]
        return self.groups[group][before * self.batch_size + row]


@dataclasses.dataclass(frozen=True)
class _HostRows:
    """Of an endless sequence cut into batches from `start` on: some rows of each batch, of `pack`
    examples each, one batch after the other.
    """

    places: Any
    start: int
    batch_size: int
    rows: tuple[int, ...]
    pack: int = 1

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        row, example = divmod(index, self.pack)
        batch, row = divmod(row, len(self.rows))
        return self.places[
            self.start + batch * self.batch_size + self.rows[row] * self.pack + example
        ]


def _mark_flags_parsed() -> None:
    """Grain's worker processes read absl flags, which only a program run through absl has parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, count: int) -> None:
    """Run first in each worker process: it leaves Ctrl-C to the parent, and ends when the parent is
    killed.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def host_rows(sharding: Any, batch_rows: int) -> list[int]:
    """Rows of a global batch that `sharding` (a `jax.sharding.Sharding` over the batch axis) puts
    on this host's devices. On a torus they need not lie side by side, and hosts that share a row
    (along mesh axes `tensor`, `sequence`) read it each.
    """
    spans = sharding.addressable_devices_indices_map((batch_rows,)).values()
    return sorted({row for (span,) in spans for row in range(*span.indices(batch_rows))})


def global_batch(
    host_batch: HostBatch, sharding: Any, rows: Sequence[int], batch_rows: int
) -> dict[str, Any]:
    """`rows` of a batch, this host's -> arrays [batch_rows, ...] over all hosts, placed by
    `sharding`.
    """
    import jax

    first = {row: position for position, row in enumerate(rows)}

    def globally(values: np.ndarray) -> Any:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_rows)
            return values[first[start] : first[start] + stop - start]

        return jax.make_array_from_callback((batch_rows, *values.shape[1:]), sharding, shard)

    return {name: globally(values) for name, values in host_batch.items()}


class DevicePrefetch(Iterator[dict[str, Any]]):
    """The loader's batches as global arrays, made in a background thread, up to `depth` of them
    ahead of the step.

    `wait_seconds` is how long the last `next` waited for data, `state()` the position after the
    batch it gave.
    """

    def __init__(self, loader: Loader, sharding: Any, depth: int = 2) -> None:
        self._loader, self._sharding = loader, sharding
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._state = loader.state()
        self.wait_seconds = 0.0
        self._thread = threading.Thread(target=self._fill, name="device-prefetch", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        while not self._stop.is_set():
            try:
                loader = self._loader
                item = (
                    global_batch(next(loader), self._sharding, loader.rows, loader.batch_rows),
                    loader.state(),
                )
            except Exception as error:  # raised again where the batch is awaited
                item = (error, None)
                self._stop.set()
            self._queue.put(item)

    def __next__(self) -> dict[str, Any]:
        began = time.perf_counter()
        batch, state = self._queue.get()
        if state is None:
            self._queue.put((batch, state))
            raise batch
        self._state = state
        self.wait_seconds = time.perf_counter() - began
        return batch

    def state(self) -> dict[str, Any]:
        return self._state

    def close(self) -> None:
        """Ends the thread and the loader's workers; batches made ahead are dropped.

        A thread that hangs in a read is left behind after ENDING seconds: it is a daemon.
        """
        self._stop.set()
        end = time.monotonic() + ENDING
        while self._thread.is_alive() and time.monotonic() < end:
            while not self._queue.empty():  # the thread may be waiting for room
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)
        self._loader.close()
