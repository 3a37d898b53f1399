"""Describe the devices of this machine before JAX has started in this process."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

SECONDS = 120  # that JAX may take to find its devices


@dataclasses.dataclass(frozen=True)
class Machine:
    """Hold what JAX finds on this machine: `platform` "cpu", "gpu" or "tpu", the kind and the
    number of its devices; and the number of CPU cores.
    """

    platform: str
    kind: str
    devices: int
    cores: int


def find_machine() -> Machine:
    """Return this machine's devices. A process of its own looks for accelerators, since a backend
    that has started here can neither be split into CPU devices nor join other hosts.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not _may_have_accelerators():
        return Machine("cpu", "cpu", 1, cores or 1)
    look = (
        "import jax, json; d = jax.devices();"
        "print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", look], capture_output=True, text=True, timeout=SECONDS
        )
        # The last line: libraries may print others before it.
        platform, kind, devices = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return Machine("cpu", "cpu", 1, cores or 1)  # the run itself reports what is wrong
    return Machine(platform, kind, devices, cores or 1)


def _may_have_accelerators() -> bool:
    """Return whether a plugin of JAX for accelerators is installed."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
