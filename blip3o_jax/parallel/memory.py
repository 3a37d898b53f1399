"""Look up the memory of a device, and reject settings that can never fit into it.

A compiler or allocator that is asked for a thousand times too much ends the process without naming
the setting. The needs counted here are lower bounds: a run that passes may still be too large for
its activations, which the compiler reports.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax

from blip3o_jax.config import ConfigError
from blip3o_jax.parallel.chips import chip_of

_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


@dataclasses.dataclass(frozen=True)
class Need:
    """Hold the bytes that one device needs at once for `setting`, and the remedy to suggest."""

    setting: str
    bytes: float
    remedy: str


def host_bytes() -> int:
    """Return the memory of this host, or of the control group that this process is confined to."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = _CGROUP.read_text().strip()
    except OSError:
        return total
    # A container's limit is lower than the machine's memory, and the kernel kills what exceeds it.
    return min(total, int(limit)) if limit.isdigit() else total


def device_bytes(devices: Sequence[jax.Device]) -> float | None:
    """Return the bytes of memory of one of this host's `devices`, or None if unknown.

    CPU devices divide the host's memory evenly.
    """
    if devices[0].platform == "cpu":
        return host_bytes() / len(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    chip = chip_of(devices[0].device_kind)
    return limit or (chip.hbm_bytes if chip else None)


def check_fits(needs: Sequence[Need], room: float | None) -> None:
    """Raise ConfigError that names the largest of `needs` unless all of them together fit into
    `room` bytes.
    """
    total = sum(need.bytes for need in needs)
    if room is None or total <= room:
        return
    largest = max(needs, key=lambda need: need.bytes)
    raise ConfigError(
        f"{largest.setting} takes at least {_gib(largest.bytes)} of memory on each device, which"
        f" has {_gib(room)} ({_gib(total)} with the rest): {largest.remedy}"
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
