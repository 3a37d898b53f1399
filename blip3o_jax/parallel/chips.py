"""Define the chips' figures: one table for every peak, bandwidth and capacity.

Figures are vendors' or jax-ml/scaling-book's ("tpus": jax-ml.github.io/scaling-book/tpus), per
*device* as JAX counts devices: a chip of v4 or v5p is one device, a chip of tpu7x is two. Rates are
per second and in bytes; ICI and DCN rates are one way.
"""

import dataclasses

from blip3o_jax.config import check_choice

BOOK = "jax-ml/scaling-book, tpus.md"
# Time of a message's head over one link, s; scaling-book, "tpus", section on networking: about 1 us
# a hop.
HOP_S = 1e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """Hold the figures of a chip. `kinds`: the values of `device.device_kind` for it."""

    name: str
    kinds: tuple[str, ...]
    flops: float  # bfloat16, dense, FLOP/s
    hbm_bytes: float
    hbm_rate: float
    dcn_rate: float  # out of a host, shared by its devices
    # Hz of the matrix unit's core; None: not known, or no cycles are estimated for it.
    clock: float | None
    source: str
    link_rate: float = 0.0  # of one ICI link; 0: no torus
    axes: int = 0  # of the torus
    wrap: int = 0  # an axis whose size is a multiple of this has wrap-around links
    devices: int = 1  # of one chip
    cores: int = 1  # that work as one device
    # One device's link to its host (PCIe), one way; the book's figure for all TPUs but v6e.
    host_rate: float = 1.5e10

    def wraps(self, size: int) -> bool:
        """Return whether an axis of `size` chips is a ring."""
        return self.wrap > 0 and size % self.wrap == 0


# Clocks follow from the peaks, peak / (2 x multipliers): v4 and v5p have 8 matrix units of 128 x
# 128 a chip, v5e 4 of them, v6e and a device of tpu7x 2 of 256 x 256 that take two rows a cycle
# (slots of a bundle in what libtpu 0.0.42.1 writes out).
_CHIPS = (
    Chip(
        "v4",
        ("TPU v4",),
        flops=275e12,
        hbm_bytes=32 * 2**30,
        hbm_rate=1.2e12,
        dcn_rate=6.25e9,
        clock=1.05e9,
        link_rate=45e9,
        axes=3,
        wrap=4,
        cores=2,
        source=BOOK,
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        hbm_bytes=16 * 2**30,
        hbm_rate=8.1e11,
        dcn_rate=3.125e9,
        clock=1.5e9,
        link_rate=45e9,
        axes=2,
        wrap=16,
        source=BOOK,
    ),
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        flops=459e12,
        hbm_bytes=95 * 2**30,
        hbm_rate=2.77e12,
        dcn_rate=6.25e9,
        clock=1.75e9,
        link_rate=90e9,
        axes=3,
        wrap=4,
        cores=2,
        source=f"{BOOK}; Google Cloud TPU v5p page (95 GiB, 2765 GB/s)",
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        hbm_bytes=32 * 2**30,
        hbm_rate=1.64e12,
        dcn_rate=12.5e9,
        clock=1.75e9,
        link_rate=90e9,
        axes=2,
        wrap=16,
        host_rate=3.2e10,
        source=f"{BOOK}; Google Cloud TPU v6e page (1640 GB/s)",
    ),
    Chip(
        "tpu7x",
        ("TPU7x",),
        flops=2307e12 / 2,
        hbm_bytes=96 * 2**30,
        hbm_rate=7.38e12 / 2,
        dcn_rate=12.5e9 / 2,
        clock=2.2e9,
        link_rate=100e9,
        axes=3,
        wrap=4,
        devices=2,
        source=(
            "Google Cloud TPU7x page: 2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s over six links,"
            " of a chip"
        ),
    ),
    # One way between GPUs of a node: half of what NVLink 4 is sold with (900 GB/s). 400 Gbit/s a
    # GPU between nodes.
    Chip(
        "H100",
        ("NVIDIA H100 80GB HBM3",),
        flops=989e12,
        hbm_bytes=80e9,
        hbm_rate=3.35e12,
        dcn_rate=50e9,
        clock=None,
        link_rate=450e9,
        source="NVIDIA H100 SXM data sheet, dense",
    ),
    Chip(
        "H200",
        ("NVIDIA H200",),
        flops=989e12,
        hbm_bytes=141e9,
        hbm_rate=4.8e12,
        dcn_rate=50e9,
        clock=None,
        link_rate=450e9,
        source="NVIDIA H200 SXM data sheet, dense",
    ),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}
BY_KIND: dict[str, Chip] = {kind: chip for chip in _CHIPS for kind in chip.kinds}


def chip_named(name: str) -> Chip:
    """Return the chip of that name. Raises ConfigError that names the nearest one."""
    check_choice("chip", name, CHIPS)
    return CHIPS[name]


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of `jax.Device.device_kind`, or None if no figures are known (CPUs)."""
    return BY_KIND.get(device_kind)
