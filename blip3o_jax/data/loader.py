"""Records -> batches: weighted mixture, seeded shuffle, worker processes, and a state of one number.

    sources -> shuffle, repeat -> mix -> this host's rows -> read + transform -> batch -> workers     (Grain)

Example n of the run is a function of (seed, n) alone: neither the number of hosts nor that of workers changes it. Row r of
global batch k is example kG + r, for G = data.batch_size. A host reads the rows that the batch's sharding puts on its devices,
wherever the mesh has these, so the global array is the same on any number of hosts and any mesh, and the position is one
number, valid for all of them.

A record that cannot be read (`BadRecord`) has its row filled by the next readable record of its source: a filter would make
the position depend on what was filtered. The row carries how many were skipped for it, and which, out of the worker process.
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import DataConfig, UserError
from blip3o_jax.data.record import BadRecord, Record, Source

Batch = dict[str, Any]
Transform = Callable[[Record], dict[str, np.ndarray]]

# A run of unreadable records as long as this ends the search for a readable one.
MAX_SKIPPED = 1000
# Seconds that a thread may take to end.
ENDING = 10.0
# What a row tells about the records skipped for it: JSON, at most this many bytes.
_REPORT_BYTES = 4096
_log = logging.getLogger(__name__)


class BadRecordLimit(UserError):
    """More records than data.max_bad_share allows could not be read."""


@dataclasses.dataclass(frozen=True)
class _Reader:
    """(source, index) -> one row: the transform's arrays, `bad_records` and a report on the records skipped."""

    sources: tuple[Source, ...]
    transform: Transform

    def __call__(self, place: tuple[int, int]) -> dict[str, Any]:
        source, start = self.sources[place[0]], place[1]
        skipped: list[tuple[str, str, str]] = []
        limit = min(len(source), MAX_SKIPPED)
        while len(skipped) < limit:
            index = (start + len(skipped)) % len(source)
            record = None
            try:
                record = source[index]
                row = self.transform(record)
            except BadRecord as error:  # what decoding raises knows neither shard nor key
                shard, key = (record.shard, record.key) if record else (error.shard, error.key)
                skipped.append((shard or source.name, key or str(index), error.reason))
            else:
                return row | {"bad_records": np.int32(len(skipped)), "_skipped": _pack(skipped)}
        shard, key, reason = skipped[-1]
        raise BadRecordLimit(
            f"{source.name}: {limit} records in a row cannot be read, the last {shard}: {key}: {reason}; repair the data set"
        )


def _pack(skipped: list[tuple[str, str, str]]) -> np.ndarray:
    """JSON of the last records skipped, in a fixed number of bytes so that rows stack and cross processes."""
    report = [(shard[-150:], key[-150:], reason[:150]) for shard, key, reason in skipped]
    while len(text := json.dumps(report, ensure_ascii=False).encode(errors="replace")) > _REPORT_BYTES:
        report.pop(0)
    return np.array(text, f"S{_REPORT_BYTES}")


class Loader(Iterator[Batch]):
    """Endless batches: dicts of arrays [B, ...] with this host's B = len(rows) examples.

    Every batch has the transform's fields, the same in each row, and `bad_records` int32 [B]: how many records were skipped to
    fill the row. Each skipped record is logged once with shard, key and reason.

    Args:
      sources: with their weights, as `sources.open_mixture` gives them. Every stretch of examples keeps to the weights
        (to a hundredth of the smallest). Those of another `shape` come in batches of their own.
      transform: a record -> the arrays of one row. `BadRecord` skips the record; any other exception ends the run.
        It must pickle, and each host must give rows of the same shapes.
      data: batch_size, pack, workers, prefetch, shuffle and max_bad_share are used. With 0 workers, threads do the work.
      rows: which rows of a global batch this host reads (`host_rows`); all by default.
      join: the arrays of `data.pack` examples that follow each other -> those of a row; needed above 1. It must pickle.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        transform: Transform,
        data: DataConfig,
        seed: int,
        *,
        rows: Sequence[int] | None = None,
        join: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None,
    ) -> None:
        self._sources, self._transform, self._data, self._seed = list(sources), transform, data, seed
        self.batch_rows, self._join = data.batch_size // data.pack, join
        self.rows = tuple(range(self.batch_rows) if rows is None else rows)
        self._next_example = 0
        self._batches: Any = None
        self._records = sum(len(source) for source, _ in self._sources)
        self._seen = self._bad = 0
        self._logged: set[tuple[str, str]] = set()
        self._last_skipped = ""
        self.wait_seconds = 0.0  # how long the last batch was waited for

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self._dataset())
        try:
            batch = dict(next(self._batches))
        except Exception:
            self.close()
            raise
        self._next_example += self._data.batch_size
        self._judge(batch["bad_records"], batch.pop("_skipped"))
        self.wait_seconds = time.perf_counter() - began
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the last batch handed out, the same on every host; fit for JSON."""
        return {"next_example": self._next_example, "order": self._order()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, on any number of hosts and workers, and with any batch size.

        Raises:
          UserError: the state belongs to another mixture, seed or order.
        """
        order = self._order()
        changed = [name for name in order if order[name] != state["order"].get(name)]
        if changed:
            was, now = ({name: o.get(name) for name in changed} for o in (state["order"], order))
            raise UserError(
                f"the data changed since the checkpoint ({was} became {now}): resuming would repeat and leave out examples; "
                "restore these settings, or start in a new directory with checkpoint.init_from"
            )
        self.close()
        self._next_example = state["next_example"]

    def close(self) -> None:
        """Ends worker processes and threads. Iterating again starts them anew, at the same position."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _order(self) -> dict[str, Any]:
        """What decides which example comes when."""
        shape = lambda source: [] if source.shape is None else [list(source.shape)]
        sources = [[len(source), weight, *shape(source)] for source, weight in self._sources]
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
        places = _HostRows(self._places(), self._next_example, self._data.batch_size, self.rows, pack)
        reader = _Reader(tuple(source for source, _ in self._sources), self._transform)
        rows = grain.MapDataset.source(places).map(reader)
        if pack > 1:
            rows = rows.batch(pack, drop_remainder=True, batch_fn=self._join)
        batches = rows.batch(len(self.rows), drop_remainder=True)
        workers = self._data.workers
        # The unit of prefetching is a batch. In a worker process one thread is enough: the processes are the parallelism.
        depth = max(1, self._data.prefetch)
        threads = 1 if workers else depth
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if workers:
            _mark_flags_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=depth)
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
            return part.repeat(None, reseed_each_epoch=self._data.shuffle).map(functools.partial(_place, number))

        def mixed(numbers: list[int]) -> Any:
            parts = [endless(number) for number in numbers]
            return grain.MapDataset.mix(parts, [self._sources[n][1] for n in numbers]) if len(parts) > 1 else parts[0]

        groups = self._shapes()
        if len(groups) == 1:
            return mixed(groups[0])
        counts = [grain.MapDataset.range(sys.maxsize // 2**20).map(functools.partial(_place, g)) for g in range(len(groups))]
        turns = grain.MapDataset.mix(counts, [sum(self._sources[n][1] for n in numbers) for numbers in groups])
        return _InTurns(turns, tuple(map(mixed, groups)), self._data.batch_size)

    def _judge(self, bad_records_B: np.ndarray, skipped_B: np.ndarray) -> None:
        """Logs what was skipped and stops the run above the share allowed."""
        bad = int(bad_records_B.sum())
        self._seen += bad_records_B.size + bad
        self._bad += bad
        for which in skipped_B.ravel() if bad else ():
            for shard, key, reason in json.loads(which):
                self._last_skipped = f"{shard}: {key}: {reason}"
                if (shard, key) not in self._logged:
                    self._logged.add((shard, key))
                    _log.warning("skipped %s", self._last_skipped)
        allowed = self._data.max_bad_share
        # Judged once a share is more than chance (10 bad records would be allowed) or the whole data set was seen.
        enough = min(self._records, max(100, math.ceil(10 / allowed))) if allowed > 0 else 0
        if self._seen >= enough and self._bad > allowed * self._seen:
            raise BadRecordLimit(
                f"{self._bad} of {self._seen} records ({self._bad / self._seen:.1%}) cannot be read, more than "
                f"data.max_bad_share={allowed:.1%}, the last {self._last_skipped}; repair the data set or raise that share"
            )


def _place(source: int, index: int) -> tuple[int, int]:
    return source, index


@dataclasses.dataclass(frozen=True)
class _InTurns:
    """Places by example number: each batch takes the next ones of one group, and `turns` says of which."""

    turns: Any  # batch -> (group, how many batches it has had)
    groups: tuple[Any, ...]
    batch_size: int

    def __getitem__(self, example: int) -> tuple[int, int]:
        batch, row = divmod(example, self.batch_size)
        group, before = self.turns[batch]
        return self.groups[group][before * self.batch_size + row]


@dataclasses.dataclass(frozen=True)
class _HostRows:
    """Of an endless sequence cut into batches from `start` on: some rows of each batch, of `pack` examples each, one batch
    after the other."""

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
        return self.places[self.start + batch * self.batch_size + self.rows[row] * self.pack + example]


def _mark_flags_parsed() -> None:
    """Grain's worker processes read absl flags, which only a program run through absl has parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, count: int) -> None:
    """Run first in each worker process: it leaves Ctrl-C to the parent, and ends when the parent is killed."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def host_rows(sharding: Any, batch_rows: int) -> list[int]:
    """Rows of a global batch that `sharding` (a `jax.sharding.Sharding` over the batch axis) puts on this host's devices. On a
    torus they need not lie side by side, and hosts that share a row (along mesh axes `tensor`, `sequence`) read it each."""
    spans = sharding.addressable_devices_indices_map((batch_rows,)).values()
    return sorted({row for (span,) in spans for row in range(*span.indices(batch_rows))})


def global_batch(host_batch: Batch, sharding: Any, rows: Sequence[int], batch_rows: int) -> Batch:
    """`rows` of a batch, this host's -> arrays [batch_rows, ...] over all hosts, placed by `sharding`."""
    import jax

    first = {row: position for position, row in enumerate(rows)}

    def globally(values: np.ndarray) -> Any:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_rows)
            return values[first[start] : first[start] + stop - start]

        return jax.make_array_from_callback((batch_rows, *values.shape[1:]), sharding, shard)

    return {name: globally(values) for name, values in host_batch.items()}


class DevicePrefetch(Iterator[Batch]):
    """The loader's batches as global arrays, made in a background thread, up to `depth` of them ahead of the step.

    `wait_seconds` is how long the last `next` waited for data, `state()` the position after the batch it gave.
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
                item = (global_batch(next(loader), self._sharding, loader.rows, loader.batch_rows), loader.state())
            except Exception as error:  # raised again where the batch is awaited
                item = (error, None)
                self._stop.set()
            self._queue.put(item)

    def __next__(self) -> Batch:
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
