"""Measure a program on the devices of this machine (`bench sharding --measure`), and calibrate
their rates.

Unpublished rates of a device (a CPU's) are calibrated from two programs that all devices run at
once, since the devices of a CPU share its cores and its memory: a matrix product, and a copy. A
collective between them is charged as a copy of its bytes.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from blip3o_jax.bench import isolated_process
from blip3o_jax.config import MeshConfig, UserError
from blip3o_jax.parallel.chips import Chip, chip_of

WARM_UP = 2
STEPS = 10
# Of the calibration: the side of the matrices and the bytes of the copy on each device; the best of
# so many turns.
CPU_SIDE, SIDE, COPY, REPEATS = 1024, 8192, 2**26, 5


@dataclasses.dataclass(frozen=True)
class LocalDevices:
    """Describe the devices of this machine, in place of a topology's."""

    chip: Chip
    devices: int
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.devices} x {self.chip.name}"

    @property
    def chips(self) -> int:
        return max(1, self.devices // self.chip.devices)


def environment(mesh: MeshConfig) -> Mapping[str, str]:
    """Return the environment of a process that runs on the devices of this machine."""
    from blip3o_jax.parallel.mesh import cpu_environment

    return cpu_environment(mesh.cpu_devices) if mesh.cpu_devices else {}


def find_devices(mesh: MeshConfig) -> LocalDevices:
    """Return the devices that a run with this mesh would get. UserError where there are none."""
    row = isolated_process.run_isolated(_probe, environment(mesh), "device")
    if "error" in row:
        raise UserError(f"--measure finds no device to run on: {row['error']}")
    return LocalDevices(
        Chip(**row["chip"] | {"kinds": tuple(row["chip"]["kinds"])}), row["devices"]
    )


def _probe() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    chip = chip_of(devices[0].device_kind) or calibrate(devices)
    return {"devices": len(devices), "chip": dataclasses.asdict(chip)}


def calibrate(devices: Any) -> Chip:
    """Measure the rates of a device, from what all of them do at once."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    count = len(devices)
    dtype, side = ("float32", CPU_SIDE) if devices[0].platform == "cpu" else ("bfloat16", SIDE)
    mesh, each = Mesh(devices, ("device",)), PartitionSpec("device")
    ones = lambda *shape: jax.jit(
        lambda: jax.numpy.ones(shape, dtype), out_shardings=NamedSharding(mesh, each)
    )()
    on_each = lambda f, inputs: jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=(each,) * inputs, out_specs=each)
    )
    square = ones(count * side, side)
    flops = 2 * side**3 / _best_seconds(on_each(lambda x, y: x @ y, 2), square, square)
    # Several copies a call: memory that is touched for the first time is slower, and no program is
    # all of that.
    row, copies = ones(count * COPY // square.dtype.itemsize), 8
    copy = on_each(lambda x: jax.lax.fori_loop(0, copies, lambda _, x: -x, x), 1)
    rate = 2 * COPY * copies / _best_seconds(copy, row)
    stats = devices[0].memory_stats() or {}
    memory = (
        stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    )
    kind = devices[0].device_kind
    return Chip(
        kind,
        (kind,),
        flops=flops,
        hbm_bytes=memory,
        hbm_rate=rate,
        # Each byte is read once and written once.
        link_rate=rate / 2,
        dcn_rate=rate / 2,
        clock=None,
        source=f"calibrated in this run, all devices at once ({count}): "
        f"{flops / 1e9:.3g} GFLOP/s a device in {dtype} "
        f"products of {side} x {side}, {rate / 1e9:.3g} GB/s in copies of {COPY / 2**20:.0f} MiB, "
        "half of that in collectives",
    )


def _best_seconds(call: Callable[..., Any], *arguments: Any) -> float:
    import jax

    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - began)
    # The best of several: other work on the machine only ever adds time.
    return min(seconds[1:])


def time_program(work: Any, program: Callable[..., Any], steps: int) -> dict[str, Any]:
    """Return the seconds of each of `steps` runs of `program`, after two to warm up, and the peak
    memory of a device, where it is reported."""
    import jax

    arguments, seconds = work.first_arguments(), []
    for _ in range(WARM_UP + steps):
        jax.block_until_ready(arguments)
        began = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
        arguments = work.next_arguments(arguments, result)
    timed = seconds[WARM_UP:]
    found = {
        "seconds": timed,
        "median_s": statistics.median(timed),
        "fastest_s": min(timed),
        "slowest_s": max(timed),
    }
    stats = work.strategy.mesh.devices.flat[0].memory_stats() or {}
    return found | (
        {"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}
    )
