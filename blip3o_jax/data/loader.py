"""Make batches of records: weighted mixture, seeded shuffle, worker processes, and its position as
state.

    sources -> shuffle, repeat -> mix -> rows -> this host's -> read + transform -> batch -> workers

The pipeline is Grain's. Example n of the run is a function of (seed, n) alone: the numbers of hosts
and workers do not change it. Without packing, row r of global batch k is example kG + r, for G =
data.batch_size. With `data.pack` E above 1 the rows are those that packing.py plans for windows of
examples, in their order, G / E a batch. A host reads the rows that the batch's sharding puts on its
devices, so the global array is the same on any number of hosts and any mesh, and the position is
valid for all of them.

A record that cannot be used (`BadRecord`, from any exception) leaves its slot of the row empty; a
row without any usable record takes the next usable one of its source: a filter would make the
position depend on what it removed. The row reports to the loader which records were skipped for it.
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

from blip3o_jax import checksums, exits
from blip3o_jax.config import DataConfig, UserError
from blip3o_jax.data.packing import PackedRows, Position, RecordId, RowIds, window_size
from blip3o_jax.data.reader import REPORT_FIELDS, Join, Reader, Transform
from blip3o_jax.data.record import Source
from blip3o_jax.data.skipped_record_log import SkippedRecordLog

HostBatch = dict[str, Any]  # arrays of the rows that this host reads


class Loader(Iterator[HostBatch]):
    """Iterate over batches without end: dicts of arrays [B, ...], B = len(rows) of this host.

    Every batch has the transform's fields, the same in each row, and `bad_records` int32 [B] ([B,
    E] where up to E examples share a row, all of them in the first slot): how many records were
    skipped to fill the row, without the too long ones. Skipped records are logged and counted
    (skipped_record_log.py).

    Args:
      sources: (source, weight) pairs, as `sources.open_mixture` returns them. Every stretch of
        examples keeps to the weights (to a hundredth of the smallest). Sources of another `shape`
        come in batches of their own.
      transform: a record -> the arrays of one row. Any exception but ConfigError skips the record.
        It must pickle, and each host must give rows of the same shapes.
      data: batch_size, max_length, pack, workers, prefetch, shuffle, too_long and max_bad_fraction
        are used. With 0 workers, threads do the work.
      rows: which rows of a global batch this host reads (`parallel.batches.host_rows`); all by
        default.
      join: joins the arrays and records of up to `data.pack` examples into those of one row, or
        raises RowTooLong. It must pickle.
      lengths: the tokens of each source's records (token_lengths.py), the same on every host. Both
        are required if `data.pack` > 1.
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
        lengths: Sequence[np.ndarray] = (),
    ) -> None:
        self._sources = list(sources)
        self._transform = transform
        self._data = data
        self._seed = seed
        self.batch_rows = data.batch_size // data.pack
        self._join = join
        # What is too long is cut to a row, or left out whatever its length is.
        longest = data.max_length if data.too_long == "truncate" else data.max_length + 1
        # The smallest type that holds them: every worker process has all of them.
        dtype = np.min_scalar_type(longest)
        self._lengths = [np.minimum(numbers, longest).astype(dtype) for numbers in lengths]
        self._length_digests = [
            checksums.crc32c([numbers.astype("<u4").tobytes()]) for numbers in self._lengths
        ]
        self.rows = tuple(range(self.batch_rows) if rows is None else rows)
        self._next_example = 0
        # Of each group of sources, with packing.
        self._positions = [Position() for _ in self._shapes()]
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
        if self._data.pack > 1:
            group, window, rows = map(int, batch.pop("_after")[0])
            batches = self._positions[group].batches + 1
            self._positions[group] = Position(window, rows, batches)
        self._skipped.add(*(batch.pop(f"_{name}") for name in REPORT_FIELDS))
        self.wait_seconds = time.perf_counter() - began
        return batch

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON can hold it: the same on every host
        except for "skipped", the counts of the records that this host has skipped.
        """
        state = {
            "next_example": self._next_example,  # with packing, of slots: some are empty
            "order": self._order(),
            "skipped": dict(self._skipped.counts),
        }
        if self._data.pack > 1:
            state["packed"] = [position._asdict() for position in self._positions]
        return state

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
        if self._data.pack > 1:
            self._positions = [Position(**position) for position in state["packed"]]
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
        data = self._data
        order = {"seed": self._seed, "shuffle": data.shuffle, "sources": sources}
        if data.pack > 1:
            # All that determines which examples share a row.
            order |= {
                "pack": data.pack,
                "max_length": data.max_length,
                "window": window_size(data.pack),
            }
            for source, digest in zip(sources, self._length_digests, strict=True):
                source["length_digest"] = digest
        # Several shapes are scheduled by batches: with another batch size the order is another.
        return order | ({"batch_size": data.batch_size} if len(self._shapes()) > 1 else {})

    def _shapes(self) -> list[list[int]]:
        """Return the numbers of the sources by the shape of their images."""
        groups: dict[Any, list[int]] = {}
        for number, (source, _) in enumerate(self._sources):
            groups.setdefault(source.shape, []).append(number)
        return list(groups.values())

    def _dataset(self) -> Any:
        import grain

        # Rows are selected before anything is read, so that a host reads only its own records.
        reader = Reader(
            tuple(source for source, _ in self._sources),
            self._transform,
            self._join,
            self._data.too_long,
            self._data.pack,
        )
        rows = grain.MapDataset.source(self._host_rows()).map(reader)
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

    def _host_rows(self) -> "_HostRows":
        """Return the rows of this host from the present position on."""
        groups = self._shapes()
        record_ids = self._record_ids()
        pack = self._data.pack
        rows: tuple[Any, ...] = (
            tuple(map(_SingleRows, record_ids))
            if pack == 1
            else tuple(
                PackedRows(
                    ids,
                    self._lengths,
                    self._data.max_length,
                    pack,
                    (self._seed, group) if self._data.shuffle else None,
                    self._positions[group],
                )
                for group, ids in enumerate(record_ids)
            )
        )
        batch = start = 0
        earlier = [0 for _ in groups]
        if len(groups) > 1:
            batch = self._next_example // self._data.batch_size
            if pack > 1:
                earlier = [position.batches for position in self._positions]
        elif pack == 1:
            # The batch size may have changed, so that no batch begins at the position.
            start = self._next_example
        return _HostRows(
            rows, self._schedule(), tuple(earlier), batch, start, self.batch_rows, self.rows, pack
        )

    def _record_ids(self) -> list[Any]:
        """Return, for each group of sources, the endless sequence of its record ids (source,
        index), the same on all hosts.
        """
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

        return list(map(mixed, self._shapes()))

    def _schedule(self) -> Any:
        """Return the groups of the batches: batch -> (group, earlier batches of that group); None
        for a single group, since every mixture of examples then makes a batch.
        """
        import grain

        groups = self._shapes()
        if len(groups) == 1:
            return None
        counts = [
            # Endless in practice, and small enough that its products with batch sizes do not
            # overflow.
            grain.MapDataset.range(sys.maxsize // 2**20).map(functools.partial(_record_id, g))
            for g in range(len(groups))
        ]
        return grain.MapDataset.mix(
            counts, [sum(self._sources[n][1] for n in numbers) for numbers in groups]
        )


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
    digests = [source.get("length_digest") for source in (old, new)]
    if None not in digests and digests[0] != digests[1]:
        found.append(
            "the tokens of its records are not those of before (their text, the template,"
            " data.too_long, or a record that can no longer be read)"
        )
    if old["digest"] != new["digest"]:
        was = "" if old["name"] == new["name"] else f" ({old['name']} then)"
        found.insert(
            0, f"its content is another{was}, {old['records']} records then, {new['records']} now"
        )
    return f"source {new['name']}: {', '.join(found)}" if found else ""


def _record_id(source: int, index: int) -> tuple[int, int]:
    return source, index


@dataclasses.dataclass(frozen=True)
class _SingleRows:
    """Index the rows of a group without packing: row n is example n."""

    record_ids: Any

    def __getitem__(self, row: int) -> tuple[RecordId, ...]:
        return (self.record_ids[row],)


@dataclasses.dataclass(frozen=True)
class _HostRows:
    """Index the rows that this host reads: of every batch, which has the next `batch_rows` rows of
    one group, it takes `rows`.

    groups: rows by number, each group counted from where `earlier` of its batches are done.
    schedule: batch -> (group, earlier batches of that group), so that every batch has images of one
      shape; None for one group.
    batch, start: the number of the first batch, and the number of its first row.
    """

    groups: tuple[Any, ...]
    schedule: Any | None
    earlier: tuple[int, ...]
    batch: int
    start: int
    batch_rows: int
    rows: tuple[int, ...]
    pack: int

    def __len__(self) -> int:
        # Grain asks for a length, and the sequence has no end.
        return sys.maxsize

    def __getitem__(self, index: int) -> RowIds:
        number, row = divmod(index, len(self.rows))
        number += self.batch
        group, before = (0, number) if self.schedule is None else self.schedule[number]
        first = self.start + (before - self.earlier[group]) * self.batch_rows
        rows = self.groups[group]
        records = rows[first + self.rows[row]]
        if self.pack == 1:
            return RowIds(records)
        # Of the whole batch: this host may not read its last row.
        return RowIds(records, (group, *rows.position(first + self.batch_rows - 1)))


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
