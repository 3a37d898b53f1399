"""Predict the time of a collective: on the torus of a slice (ICI), or between slices (DCN).

A group that covers a box of the torus moves its data over all of the box's axes at once, in both
directions where an axis is a ring (scaling-book, "sharding": an all-gather of V bytes takes V /
(rate of the links used)); groups that interleave on an axis share its links. In addition to the
bytes every hop takes time. Between slices each device's part goes out through its host.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from blip3o_jax.parallel.chips import HOP_S, Chip

GATHERS = ("all-gather", "reduce-scatter")
COLLECTIVES = (
    *GATHERS,
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
GPUS_A_NODE = 8


@dataclasses.dataclass(frozen=True)
class TorusLine:
    """Describe the devices of a group along one axis of the torus."""

    length: int
    ring: bool
    link_fraction: float  # of the axis's links that belongs to the group


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Model the network between devices, numbered as in the program: in the mesh's order."""

    chip: Chip
    mesh: dict[str, int]  # axis -> size, the last one fastest
    coords: np.ndarray  # [devices, axes of the torus]
    cores: np.ndarray  # [devices], which device of its chip
    slices: np.ndarray  # [devices]

    @classmethod
    def of(cls, chip: Chip, mesh: dict[str, int], devices: Sequence[object]) -> "Network":
        """Build the network of JAX's devices; those without coordinates (GPUs) lie in nodes of
        eight.
        """
        coords = [tuple(getattr(d, "coords", None) or (i,)) for i, d in enumerate(devices)]
        slices = [getattr(d, "slice_index", 0) or 0 for d in devices]
        if not chip.axes:
            slices = [i // GPUS_A_NODE for i in range(len(coords))]
        cores = [getattr(d, "core_on_chip", 0) or 0 for d in devices]
        return cls(chip, mesh, np.array(coords), np.array(cores), np.array(slices))

    @property
    def devices(self) -> int:
        return len(self.slices)

    def axes(self, group: Sequence[int]) -> tuple[str, ...]:
        """Return the mesh axes along which the members of a group differ."""
        coords = np.array(np.unravel_index(np.array(group), tuple(self.mesh.values())))
        return tuple(
            axis for axis, row in zip(self.mesh, coords, strict=True) if len(set(row.tolist())) > 1
        )

    def crosses(self, group: Sequence[int]) -> bool:
        return len(set(self.slices[list(group)].tolist())) > 1

    def seconds(self, kind: str, size: float, group: Sequence[int]) -> float:
        """Return the seconds of one collective over `group`. `size`: bytes of one device, the whole
        array for gathers, scatters and reductions, the device's part for all-to-all and permutes.
        """
        group = list(group)
        if len(group) < 2:
            return 0.0
        # A reduce-scatter and an all-gather.
        times = 2 if kind == "all-reduce" else 1
        # Hierarchical: first within a slice, where it has a part of the array, then between slices.
        parts, total = sorted(set(self.slices[group].tolist())), 0.0
        if len(parts) > 1:
            inside = [i for i in group if self.slices[i] == parts[0]]
            total = times * size / len(inside) * (1 - 1 / len(parts)) / self.chip.dcn_rate
            group = inside
        if len(group) < 2:
            return total
        if not self.chip.axes:
            return total + times * size * (1 - 1 / len(group)) / self.chip.link_rate
        lines = self._lines(group)
        # Half way round a ring, from end to end of a line.
        latency = sum(line.length / 2 if line.ring else line.length - 1 for line in lines) * HOP_S
        if kind.endswith("all-to-all"):
            slowest = max(
                (line.length / (8 if line.ring else 4) / line.link_fraction for line in lines),
                default=0.0,
            )
            return total + size * slowest / self.chip.link_rate + latency
        rate = (
            sum(
                self.chip.link_rate * (2 if line.ring else 1) * line.link_fraction for line in lines
            )
            or self.chip.link_rate
        )
        return total + times * (size * (1 - 1 / len(group)) / rate + latency)

    @property
    def slice_axes(self) -> tuple[str, ...]:
        """Return the mesh axes that lead from slice to slice: those of the first devices of all
        slices.
        """
        return self.axes(
            [int(np.argmax(self.slices == s)) for s in sorted(set(self.slices.tolist()))]
        )

    def transfer_seconds(self, kind: str, size: float) -> float:
        """Return the seconds that each device's `size` bytes take through its host when slices
        exchange their parts of a collective."""
        slices = len(set(self.slices.tolist()))
        times = {"all-reduce": 2 * (1 - 1 / slices), "all-gather": slices - 1}.get(kind, 1)
        return times * size / self.chip.dcn_rate

    def permute_seconds(self, size: float, pairs: Sequence[tuple[int, int]]) -> float:
        """Return the time of every device sending `size` bytes at once: the longest way, over links
        that the others on it use too.
        """
        between = [(a, b) for a, b in pairs if a != b]
        if not between:
            return 0.0
        if self.crosses_pairs(between):
            return size / self.chip.dcn_rate
        if not self.chip.axes:
            return size / self.chip.link_rate
        hops = max(self._hops(a, b) for a, b in between)
        return hops * (size / self.chip.link_rate + HOP_S) if hops else size / self.chip.hbm_rate

    def crosses_pairs(self, pairs: Sequence[tuple[int, int]]) -> bool:
        return any(self.slices[a] != self.slices[b] for a, b in pairs)

    def _sizes(self) -> np.ndarray:
        return self.coords.max(axis=0) - self.coords.min(axis=0) + 1

    def _hops(self, a: int, b: int) -> int:
        total = 0
        for size, x, y in zip(
            self._sizes().tolist(), self.coords[a].tolist(), self.coords[b].tolist(), strict=True
        ):
            distance = abs(x - y)
            total += min(distance, size - distance) if self.chip.wraps(size) else distance
        return total

    def _lines(self, group: list[int]) -> list[TorusLine]:
        coords, cores = self.coords[group], self.cores[group]
        # Groups on one device of each chip share the chip's links with those on the other.
        own = len(set(cores.tolist())) / self.chip.devices
        lines = []
        for axis, size in enumerate(self._sizes().tolist()):
            at = sorted(set(coords[:, axis].tolist()))
            if len(at) < 2:
                continue
            steps = {b - a for a, b in itertools.pairwise(at)}
            around = len(steps) == 1 and len(at) * min(steps) == size
            ring = around and self.chip.wraps(size)
            span = size if around else at[-1] - at[0] + 1
            lines.append(TorusLine(len(at), ring, own * len(at) / span))
        # What is no box takes less of it than the box has: the links carry others' data too.
        chips = len({tuple(c) for c in coords.tolist()})
        filled = chips / max(1, int(np.prod([line.length for line in lines])))
        return [
            dataclasses.replace(line, link_fraction=line.link_fraction * filled) for line in lines
        ]
