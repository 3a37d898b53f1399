"""Search the largest batch that the compiler accepts, for one topology and strategy.

A global batch is counted in units, one example for each shard and micro-batch; the search closes in
on the number of units n where n is the largest that fits and n + 1 the smallest that does not, by
the compiler's own decisions. Compiles take minutes, so each guess comes from the memory of those
before it, which is close to linear in the batch:

    bytes(n) = fixed + n * slope        fixed: parameters, optimizer; n * slope: batch, temporaries

After one compile the slope is all memory that is not fixed, a low guess; after two it is the line
through both. A guess outside of the bracket becomes its nearest end, and the next such guess moves
twice as far into it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from blip3o_jax.bench.isolated_process import Row
from blip3o_jax.bench.sharding.compiled_step import FITS, TOO_LARGE, Task
from blip3o_jax.bench.sharding.table import GIB
from blip3o_jax.parallel.planner import plan_groups

# The kinds of memory that do not grow with the batch.
FIXED = ("parameters", "frozen", "optimizer", "averages", "weights", "program")
# From this many units on, a bracket of one part in so many is narrow enough.
FINE_UNITS = 64
MAX_COMPILES = 12  # compiles


def unit(task: Task) -> int:
    """Return the examples of the smallest global batch that divides over the mesh; all others are
    multiples of it.
    """
    mesh = plan_groups(task.config.mesh, task.topology.devices)
    shards = max(1, task.topology.devices // max(1, mesh.sequence * mesh.tensor))
    return shards * (task.config.optimizer.accumulate if task.step == "train" else 1)


def with_batch(task: Task, rows: int) -> Task:
    """Return the task with a global batch of `rows` examples, or prompts."""
    group = "data" if task.step == "train" else "sampling"
    sizes = dataclasses.replace(getattr(task.config, group), batch_size=rows)
    return dataclasses.replace(task, config=dataclasses.replace(task.config, **{group: sizes}))


def largest(task: Task, compile_row: Callable[[Task], Row], log: Callable[[str], None]) -> Row:
    """Return the row of the largest batch that fits, with all that were tried and their outcomes
    under "tried"; the row of the smallest batch where that does not fit. `log` gets a line before
    and after each compile."""
    one = unit(task)
    search, guess = Search(), 1
    tried: list[dict[str, Any]] = []
    best: Row = {}
    while True:
        batch = {"batch_size": guess * one, "batch_per_chip": guess * one / task.topology.chips}
        log(f"compiling with {batch['batch_per_chip']:g} a chip")
        row = compile_row(with_batch(task, guess * one)) | batch
        size = row["memory"]["total"] if row["status"] == FITS else row.get("needs_bytes")
        tried.append(
            batch
            | {"status": row["status"]}
            | ({"bytes": size} if size else {"error": row.get("error")})
        )
        log(outcome(tried[-1]))
        search.learn(guess, row, size)
        if row["status"] == FITS or not best:
            best = row
        # Another failure, such as a lack of memory on this machine, does not bound the batch.
        if search.done or len(tried) == MAX_COMPILES or row["status"] not in (FITS, TOO_LARGE):
            return best | {"tried": tried}
        guess = search.guess()


def outcome(tried: dict[str, Any]) -> str:
    """Return the outcome of one batch: "8 a chip does not fit (20.1 GiB)"."""
    why = f" ({tried['bytes'] / GIB:.1f} GiB)" if "bytes" in tried else f": {tried['error']}"
    return f"{tried['batch_per_chip']:g} a chip {tried['status']}{why}"


@dataclasses.dataclass
class Search:
    """Hold the bracket, and the memory of the batches tried, in units."""

    fits: int = 0
    too_many: int | None = None
    sizes: dict[int, float] = dataclasses.field(default_factory=dict)
    fixed: float = 0.0
    capacity: float = math.inf
    missed: int = 0  # guesses in a row that fell outside of the bracket

    def learn(self, units: int, row: Row, size: float | None) -> None:
        if row["status"] == FITS:
            self.fits = units
            self.fixed = sum(row["memory"].get(kind, 0) for kind in FIXED)
            self.capacity = min(self.capacity, row["memory"]["capacity"])
        else:
            self.too_many = units
            self.capacity = row.get(
                "capacity_bytes", self.capacity
            )  # the compiler keeps some for itself
        if size:
            self.sizes[units] = size

    @property
    def done(self) -> bool:
        return self.too_many is not None and self.too_many - self.fits <= max(
            1, self.fits // FINE_UNITS
        )

    def guess(self) -> int:
        """Return the units to try next, strictly within the bracket."""
        aim = self._aim()
        low = self.fits + 1
        high = (self.too_many or math.inf) - 1
        if low <= aim <= high:
            self.missed = 0
            return aim
        times = 2**self.missed
        self.missed += 1
        if self.too_many is None:
            return self.fits + max(1, self.fits // FINE_UNITS) * times
        middle = (self.fits + self.too_many) // 2
        if aim < low:
            return min(self.fits + max(1, self.fits // FINE_UNITS) * times, middle)
        return max(self.too_many - max(1, self.too_many // FINE_UNITS) * times, middle)

    def _aim(self) -> int:
        """Return where the line meets the device's memory: through the two sizes nearest to the
        bracket, or from the fixed memory after one compile."""
        around = [
            *[n for n in sorted(self.sizes) if n <= self.fits][-2:],
            *[n for n in sorted(self.sizes) if n > self.fits][:1],
        ]
        first, last = around[-2:] if len(around) > 1 else (0, around[-1])
        start = self.sizes.get(first, self.fixed)
        slope = (self.sizes[last] - start) / (last - first)
        return int(first + (self.capacity - start) / slope) if slope > 0 else 2 * self.fits
