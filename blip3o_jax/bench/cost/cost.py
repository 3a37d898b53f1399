"""Hold the predicted cost of a program on one device, and add costs up."""

import collections
import dataclasses
from typing import Any

LIMITERS = ("compute", "HBM", "ICI", "DCN", "host")


@dataclasses.dataclass
class Traffic:
    """Sum one kind of collective on one set of mesh axes. `size`: bytes of a device, as in
    network.py."""

    count: int = 0
    size: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0  # seconds that the core waits for it


@dataclasses.dataclass
class Unknown:
    """Sum the operations of one opcode that has no known class."""

    count: int = 0
    size: float = 0.0  # bytes read and written
    seconds: float = 0.0


Collective = tuple[str, tuple[str, ...], str]  # kind, mesh axes, ICI or DCN


@dataclasses.dataclass
class Cost:
    """Hold the cost of a program on one device. Seconds by limiter add up to the predicted time."""

    flops: dict[tuple[str, str], float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    hbm_bytes: float = 0.0
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    part_seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    collectives: dict[Collective, Traffic] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Traffic)
    )
    unknown: dict[str, Unknown] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Unknown)
    )

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def limiter(self) -> str:
        return max(LIMITERS, key=lambda name: self.seconds[name])

    @property
    def unknown_fraction(self) -> float:
        """Return the fraction of the predicted time that went to operations of no known class."""
        return sum(u.seconds for u in self.unknown.values()) / (self.total_seconds or 1)

    def add(self, other: "Cost", times: float = 1) -> None:
        self.hbm_bytes += other.hbm_bytes * times
        sums: tuple[tuple[dict[Any, float], dict[Any, float]], ...] = (
            (self.flops, other.flops),
            (self.seconds, other.seconds),
            (self.part_seconds, other.part_seconds),
        )
        for mine, theirs in sums:
            for key, value in theirs.items():
                mine[key] += value * times
        records: tuple[tuple[dict[Any, Any], dict[Any, Any]], ...] = (
            (self.collectives, other.collectives),
            (self.unknown, other.unknown),
        )
        for ours, others in records:
            for key, record in others.items():
                for field in dataclasses.fields(record):
                    total = getattr(ours[key], field.name) + getattr(record, field.name) * times
                    setattr(ours[key], field.name, total)
