"""Describe TPU topologies without TPUs: devices to compile for, ahead of time, from "v5p:8x8x8".

The compiler is libtpu's and runs on any x86-64 Linux machine. Its settings are read when JAX starts
its backend, so a process puts those of `settings` into its environment before it imports jax.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from blip3o_jax.config import ConfigError, UserError, check_choice
from blip3o_jax.config.errors import first_line, install_command
from blip3o_jax.parallel import flags
from blip3o_jax.parallel.chips import CHIPS, Chip

TPUS = tuple(name for name, chip in CHIPS.items() if chip.axes)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Describe a topology by `sizes`, those of the torus of one slice in chips."""

    chip: Chip
    sizes: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}" + (
            f" x {self.slices} slices" if self.slices > 1 else ""
        )

    @property
    def chips(self) -> int:
        return math.prod(self.sizes) * self.slices

    @property
    def devices(self) -> int:
        """Return the number of devices, as JAX counts them."""
        return self.chips * self.chip.devices


def parse(text: str, slices: int = 1) -> Topology:
    """Parse "v5p:8x8x8". ConfigError for what is no topology, with what would be."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.strip())
    if match:
        check_choice(f"--topology={text}: chip", match[1], TPUS)
    else:
        raise ConfigError(
            f"--topology={text!r} must be a chip and the number of chips along each axis: "
            f"{', '.join(map(_example, TPUS))}, ..."
        )
    chip, sizes = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    if len(sizes) != chip.axes or 0 in sizes:
        raise ConfigError(
            f"--topology={text!r}: {chip.name} has {chip.axes} axes, as in {_example(chip.name)}"
        )
    if slices < 1:
        raise ConfigError(f"--slices={slices} must be positive")
    return Topology(chip, sizes, slices)


def _example(name: str) -> str:
    return f"{name}:{'x'.join(['4'] * CHIPS[name].axes)}"


def check_compiler() -> None:
    """Raise UserError where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU topology needs libtpu, which is not installed:"
            f" {install_command('tpu')} (x86-64 Linux)"
        )


def settings(chip: Chip) -> dict[str, str]:
    """Return the environment of a process that compiles for TPUs it does not have, with the flags
    that the launchers set, so that the program is the one that runs there. Of two equal flags the
    last counts, so the user's flags come last."""
    return {
        "LIBTPU_INIT_ARGS": flags.environment(chip.name, os.environ)["LIBTPU_INIT_ARGS"],
        "JAX_PLATFORMS": "cpu",
        # There is no metadata server and no other host.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v6e-16",  # any: without one libtpu warns
        # The lock is for TPUs, of which there are none; with it a second process would end.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
    }


def make_devices(topology: Topology) -> Sequence[Any]:
    """Return JAX's devices of a topology, to build a mesh of. UserError where the compiler refuses
    it.
    """
    from jax.experimental import topologies

    check_compiler()
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.sizes))}"
    several: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if name.startswith("v4:"):
        several["chip_config_name"] = "megacore"  # both cores of a chip as one device, as v4 is run
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **several
        ).devices
    except Exception as error:  # of any type: the name is not valid
        reason = first_line(error)
        raise UserError(
            f"--topology={name}: the TPU compiler has no such topology ({reason})"
        ) from error
    if len(devices) != topology.devices:
        raise UserError(
            f"--topology={name}: {len(devices)} devices, not the {topology.devices} that its sizes "
            "come to"
        )
    return devices
