"""The only place where a device mesh is made."""

import contextlib
import math
from collections.abc import Sequence

import jax
import numpy as np

from blip3o_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with axes data x fsdp x tensor over `devices` (all by default).

    Raises ConfigError when the sizes do not multiply to the number of devices, with the sizes that would do.
    """
    if devices is None and cfg.cpu_devices:
        _split_cpu(cfg.cpu_devices)
    devices = list(jax.devices() if devices is None else devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ConfigError(f"mesh sizes data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor}: positive, and -1 at most once")
    known = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh data={cfg.data} x fsdp={cfg.fsdp} x tensor={cfg.tensor} does not cover {len(devices)} devices: "
            "make the product equal to it, or set one size to -1"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    if len(devices) == 1:
        return jax.sharding.Mesh(np.array(devices).reshape(sizes), AXES, axis_types=auto)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)


def _split_cpu(count: int) -> None:
    # An earlier run in this process may have settled it.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
