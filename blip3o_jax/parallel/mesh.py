"""Create the device mesh: the only module of the package that creates one."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from blip3o_jax.config import ConfigError, MeshConfig
from blip3o_jax.config.errors import first_line

AXES = ("data", "fsdp", "sequence", "tensor")
THREADS_PER_CPU_DEVICE = 8


def mesh_devices(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> list[jax.Device]:
    """Return `devices`, by default all; a machine without an accelerator is split first, as
    `cfg.cpu_devices` says.
    """
    if devices is None and cfg.cpu_devices:
        # Before jax.devices(), which starts the backend and so fixes their number.
        split_cpu(cfg.cpu_devices)
    return list(jax.devices() if devices is None else devices)


def slices_of(devices: Sequence[jax.Device]) -> set[int]:
    """Return the numbers of the TPU slices that the devices lie in; other devices lie in one."""
    return {
        getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices
    }


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Return a mesh with axes data x fsdp x sequence x tensor over `devices` (all by default); the
    devices of the last axes are neighbours. With `cfg.slices` the data axis spans the slices first,
    so that only the sum of the gradients crosses the network between them. No field of `cfg` may be
    open (0; planner.py).

    Raises ConfigError when the sizes do not multiply to the number of devices, with sizes that do;
    when `cfg.slices` differs from the devices' slices; when JAX cannot lay the mesh onto the chips'
    torus.
    """
    devices = mesh_devices(cfg, devices)
    sizes = [getattr(cfg, axis) for axis in AXES]
    known = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {_named(cfg, ' x ')} does not cover {len(devices)} devices: "
            "make the product equal to it, or set one size to -1"
        )
    # Auto axes: XLA propagates shardings between the constraints of `nn.constrain`. Explicit axes,
    # the default of `jax.make_mesh`, put shardings into the types, and every operation whose result
    # is ambiguous would have to state its own.
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    if cfg.slices != 1:
        return jax.sharding.Mesh(_over_slices(cfg.slices, sizes, devices), AXES, axis_types=auto)
    there = slices_of(devices)
    if len(there) > 1:
        raise ConfigError(
            f"devices span {len(there)} slices, but mesh.slices=1: set mesh.slices={len(there)} and"
            f" mesh.data to a multiple of {len(there)}"
        )
    return jax.sharding.Mesh(
        _on_torus(mesh_utils.create_device_mesh, sizes, devices=devices), AXES, axis_types=auto
    )


def _on_torus(
    place: Callable[..., np.ndarray], *sizes: list[int], devices: list[jax.Device]
) -> np.ndarray:
    """Return `place(*sizes, devices)`, of `mesh_utils`; `sizes[0]` are the axes within a slice.

    Raises ConfigError if these do not fit onto the torus of a slice.
    """
    try:
        # Several mesh axes may split one axis of the torus: otherwise fsdp=16 would not fit into
        # 8 x 8 x 8 chips.
        return place(*sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, ValueError) as error:
        named = " x ".join(
            f"{axis}={size}" for axis, size in zip(AXES, sizes[0], strict=True) if size > 1
        )
        raise ConfigError(
            f"mesh {named} cannot be laid onto the torus of a slice, choose other sizes:"
            f" {first_line(error)}"
        ) from error


def _named(cfg: MeshConfig, between: str) -> str:
    """Return the axes and sizes of `cfg` as text; `sequence` only if its size is not 1."""
    return between.join(
        f"{axis}={getattr(cfg, axis)}" for axis in AXES if axis != "sequence" or cfg.sequence != 1
    )


def _over_slices(slices: int, sizes: list[int], devices: list[jax.Device]) -> np.ndarray:
    if slices < 1 or sizes[0] % slices:
        raise ConfigError(
            f"mesh.slices={slices}: data={sizes[0]} spans the slices, so it must be a multiple"
            f" of their number; set mesh.data to {max(slices, 1)}"
        )
    there = slices_of(devices)
    if len(there) == 1:
        # A single slice, or processes on one machine: blocks of neighbours stand for slices.
        return np.array(devices).reshape(sizes)
    if len(there) != slices:
        raise ConfigError(
            f"devices span {len(there)} slices, but mesh.slices={slices}: set"
            f" mesh.slices={len(there)}"
        )
    # Slices divide the data axis alone: only the sum of gradients leaves a slice.
    within = [sizes[0] // slices, *sizes[1:]]
    across = [slices, *[1] * (len(sizes) - 1)]
    return _on_torus(mesh_utils.create_hybrid_device_mesh, within, across, devices=devices)


def cpu_environment(count: int) -> dict[str, str]:
    """Return the environment of a process that splits the CPU into `count` devices, to be set
    before JAX starts its backend.
    """
    # A device that waits in a collective holds one of XLA's threads, and it may wait in several
    # collectives at once. XLA creates one thread for each core or device; with more devices than
    # cores, a deadlock was seen: all threads were held by waiting devices, and the last device had
    # none. XLA reads the number of cores from NPROC when it creates its threads.
    many = count > (os.cpu_count() or 1)
    return {"JAX_NUM_CPU_DEVICES": str(count)} | (
        {"NPROC": str(THREADS_PER_CPU_DEVICE * count)} if many else {}
    )


def split_cpu(count: int) -> None:
    """Split the CPU into `count` devices, unless this process has devices already."""
    if threads := cpu_environment(count).get("NPROC"):
        os.environ.setdefault("NPROC", threads)
    # JAX raises RuntimeError once the backend has started, as after an earlier run in this process.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
