"""Make batches of records: weighted mixture, seeded shuffle, worker processes, and one number as
state.

    sources -> shuffle, repeat -> mix -> this host's rows -> read + transform -> batch -> workers

The pipeline is Grain's. Example n of the run is a function of (seed, n) alone: the numbers of hosts
and workers do not change it. Row r of global batch k is example kG + r, for G = data.batch_size. A
host reads the rows that the batch's sharding puts on its devices, so the global array is the same
on any number of hosts and any mesh, and the position is one number, valid for all of them.

The row of a record that cannot be used (`BadRecord`, from any exception) is filled by the next
usable record of its source: a filter would make the position depend on what it removed. The row
reports to the loader which records were skipped for it.
"""

import dataclasses
import functools
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blip3o_jax import exits
from blip3o_jax.config import DataConfig, UserError
from blip3o_jax.data.reader import Join, Reader, Transform
from blip3o_jax.data.record import Source
from blip3o_jax.data.skipped_record_log import SkippedRecordLog

HostBatch = dict[str, Any]  # arrays of the rows that this host reads


class Loader(Iterator[HostBatch]):
    """Iterate over batches without end: dicts of arrays [B, ...], B = len(rows) of this host.

    Every batch has the transform's fields, the same in each row, and `bad_records` int32 [B] ([B,
    E] where E examples share a row): how many records were skipped to fill the row, without the too
    long ones. Skipped records are logged and counted (skipped_record_log.py).

    Args:
      sources: (source, weight) pairs, as `sources.open_mixture` returns them. Every stretch of
        examples keeps to the weights (to a hundredth of the smallest). Sources of another `shape`
        come in batches of their own.
      transform: a record -> the arrays of one row. Any exception but ConfigError skips the record.
        It must pickle, and each host must give rows of the same shapes.
      data: batch_size, pack, workers, prefetch, shuffle, too_long and max_bad_fraction are used.
        With 0 workers, threads do the work.
      rows: which rows of a global batch this host reads (`parallel.batches.host_rows`); all by
        default.
      join: joins the arrays and records of `data.pack` consecutive examples into those of one row,
        or raises RowTooLong; required if `data.pack` > 1. It must pickle.
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
        self._sources = list(sources)
        self._transform = transform
        self._data = data
        self._seed = seed
        self.batch_rows = data.batch_size // data.pack
        self._join = join
        self.rows = tuple(range(self.batch_rows) if rows is None else rows)
        self._next_example = 0
        self._batches: Any = None
        records = sum(len(source) for source, _ in self._sources)
        self._skipped = SkippedRecordLog(records, data.max_bad_fraction)  # of this host's rows
        self.wait_seconds = 0.0  # of the last batch

    def __next__(self) -> HostBatch:
        began = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self._dataset())
        try:
            batch = dict(next(self._batches))
        # The next call starts workers again at the same position.
        except Exception:
            self.close()
            raise
        # The global batch size: the position counts the examples of all hosts.
        self._next_example += self._data.batch_size
        self._skipped.add(batch["bad_records"], batch.pop("_shards"), batch.pop("_skipped"))
        self.wait_seconds = time.perf_counter() - began
        return batch

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON can hold it: the same on every host
        except for "skipped", the counts of the records that this host has skipped.
        """
        return {
            "next_example": self._next_example,
            "order": self._order(),
            "skipped": dict(self._skipped.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the position `state`, on any number of hosts and workers, and with any
        batch size.

        Raises:
          UserError: the state belongs to another mixture, seed or order.
        """
        if changed := _changes(state["order"], self._order()):
            raise UserError(
                f"the data changed since the checkpoint: {changed}: resuming would repeat and leave"
                " out examples; restore what was there, or start in a new directory with"
                " checkpoint.init_from"
            )
        # Workers have read ahead from another position.
        self.close()
        self._next_example = state["next_example"]
        self._skipped.counts = Counter(state["skipped"])

    def close(self) -> None:
        """End worker processes and threads. Iterating again restarts them at the same position."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _order(self) -> dict[str, Any]:
        """Return everything that determines the order of the examples."""
        sources = [
            {
                "name": source.name,  # for messages: a copy elsewhere is the same data
                "digest": source.fingerprint,
                "records": len(source),
                "weight": weight,
                # A list, which is what JSON gives back for a tuple.
                "shape": source.shape and list(source.shape),
            }
            for source, weight in self._sources
        ]
        order = {"seed": self._seed, "shuffle": self._data.shuffle, "sources": sources}
        # Several shapes are scheduled by batches: with another batch size the order is another.
        return order | ({"batch_size": self._data.batch_size} if len(self._shapes()) > 1 else {})

    def _shapes(self) -> list[list[int]]:
        """Return the numbers of the sources by the shape of their images."""
        groups: dict[Any, list[int]] = {}
        for number, (source, _) in enumerate(self._sources):
            groups.setdefault(source.shape, []).append(number)
        return list(groups.values())

    def _dataset(self) -> Any:
        import grain

        pack = self._data.pack
        # Rows are selected before anything is read, so that a host reads only its own records.
        record_ids = _HostRows(
            self._record_ids(), self._next_example, self._data.batch_size, self.rows, pack
        )
        reader = Reader(
            tuple(source for source, _ in self._sources),
            self._transform,
            self._join,
            self._data.too_long,
        )
        rows = (
            grain.MapDataset.source(record_ids)
            # `tuple`: the ids of a row's examples stay apart for the reader.
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

    def _record_ids(self) -> Any:
        """Return the endless sequence of record ids (source, index), the same on all hosts."""
        import grain

        # One seed a source, far apart: Grain shuffles epoch e with seed + e.
        seeds = np.random.SeedSequence(self._seed).generate_state(len(self._sources))

        def endless(number: int) -> Any:
            part = grain.MapDataset.range(len(self._sources[number][0]))
            if self._data.shuffle:
                # An index shuffle: Grain computes a permutation's entry without storing the
                # permutation.
                part = part.shuffle(seed=int(seeds[number]))
            return part.repeat(None, reseed_each_epoch=self._data.shuffle).map(
                functools.partial(_record_id, number)
            )

        def mixed(numbers: list[int]) -> Any:
            parts = [endless(number) for number in numbers]
            return (
                grain.MapDataset.mix(parts, [self._sources[n][1] for n in numbers])
                if len(parts) > 1
                else parts[0]
            )

        groups = self._shapes()
        # A single shape needs no schedule: every mixture of examples makes a batch.
        if len(groups) == 1:
            return mixed(groups[0])
        counts = [
            # Endless in practice, and small enough that its products with batch sizes do not
            # overflow.
            grain.MapDataset.range(sys.maxsize // 2**20).map(functools.partial(_record_id, g))
            for g in range(len(groups))
        ]
        schedule = grain.MapDataset.mix(
            counts, [sum(self._sources[n][1] for n in numbers) for numbers in groups]
        )
        return _BucketSchedule(schedule, tuple(map(mixed, groups)), self._data.batch_size)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return how the order of examples differs from that of a checkpoint; "" if it does not."""
    found = [
        f"{name} was {before.get(name)}, now it is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name != "sources" and before.get(name) != now.get(name)
    ]
    old = before["sources"]
    new = now["sources"]
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
    """Return how a source differs from the one at the same position of the checkpoint's mixture."""
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


def _record_id(source: int, index: int) -> tuple[int, int]:
    return source, index


@dataclasses.dataclass(frozen=True)
class _BucketSchedule:
    """Map example numbers to record ids so that every batch has images of one shape: a batch takes
    the next record ids of one group, chosen by `schedule`.
    """

    schedule: Any  # batch -> (group, number of earlier batches of that group)
    groups: tuple[Any, ...]
    batch_size: int

    def __getitem__(self, example: int) -> tuple[int, int]:
        batch, row = divmod(example, self.batch_size)
        group, before = self.schedule[batch]
        return self.groups[group][before * self.batch_size + row]


@dataclasses.dataclass(frozen=True)
class _HostRows:
    """Index the record ids of this host: the endless sequence is cut into batches from `start` on,
    and of each batch this host takes `rows`, of `pack` examples each.
    """

    record_ids: Any
    start: int
    batch_size: int
    rows: tuple[int, ...]
    pack: int = 1

    def __len__(self) -> int:
        # Grain asks for a length, and the sequence has no end.
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        row, example = divmod(index, self.pack)
        batch, row = divmod(row, len(self.rows))
        return self.record_ids[
            self.start + batch * self.batch_size + self.rows[row] * self.pack + example
        ]


def _mark_flags_parsed() -> None:
    """Mark absl's flags as parsed, since Grain's worker processes read them and only absl's own
    main parses them.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, count: int) -> None:
    """Leave Ctrl-C to the parent process and end when the parent is killed; runs first in each
    worker process.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exits.end_with_parent()
