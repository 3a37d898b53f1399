"""Settings of the device mesh and of the sharding strategy."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds, NonZero
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.types import Part

MeshSize = Annotated[
    int, Bounds(-1, 2**20, note="-1 takes what is left"), NonZero("1 leaves the axis out")
]
StrategyName = Literal[
    "dp",
    "fsdp",
    "fsdp_tp",
    "fsdp_sp",
    "hybrid",
    "hybrid_dp",
    "hybrid_fsdp",
    "hybrid_fsdp_tp",
    "hybrid_fsdp_sp",
]


@dataclasses.dataclass(frozen=True)
class MeshConfig(ConfigGroup, path="mesh"):
    """Set the number of devices along each mesh axis; -1 takes the rest. The batch is sharded over
    data x fsdp, and the tokens of a row over sequence if the strategy says so.
    """

    data: MeshSize = 1
    fsdp: MeshSize = -1
    tensor: MeshSize = 1
    strategy: StrategyName = "fsdp"
    sequence: MeshSize = 1
    # Of chips that only the data centre's network joins; data lies over them first.
    slices: Annotated[int, Bounds(1, 2**16)] = 1
    # Strategies of single parts in place of `strategy`'s own: {part: strategy}, {"dit": "dp"} keeps
    # a whole DiT on each device.
    parts: tuple[tuple[Part, StrategyName], ...] = ()
    # Devices that a machine without an accelerator is split into, if this run is the first to ask
    # for devices; 0 leaves it whole. XLA spreads small operations badly over cores, but runs one
    # device a core without loss.
    cpu_devices: Annotated[int, Bounds(0, 1024)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}
        listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
        once = list(sizes.values()).count(-1) <= 1
        check(once, f"mesh sizes {listed}: only one can be -1, which takes what is left")
