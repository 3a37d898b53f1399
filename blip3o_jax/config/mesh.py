"""Settings of the device mesh and of the sharding strategy."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.types import Part

MeshSize = Annotated[
    int,
    Bounds(-1, 2**20, note="-1 takes what is left, 0 leaves the choice to the planner"),
]
NamedStrategy = Literal[
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
StrategyName = Literal["auto", NamedStrategy]


@dataclasses.dataclass(frozen=True)
class MeshConfig(ConfigGroup, path="mesh"):
    """Set the number of devices along each mesh axis: -1 takes the rest, 0 leaves the choice to
    parallel/planner.py, by model and devices. The batch is sharded over data x fsdp, and the tokens
    of a row over sequence if the strategy says so.
    """

    data: MeshSize = 0
    """Devices along `data`: each of its groups has a copy of the parameters and its own rows."""
    fsdp: MeshSize = 0
    """Devices along `fsdp`, over which parameters, optimizer state and batch are sharded."""
    tensor: MeshSize = 0
    """Devices along `tensor`, over which heads and feed-forward widths are sharded."""
    strategy: StrategyName = "auto"
    """Sharding strategy: which dimensions of parameters and activations each axis shards; auto
    leaves the choice to the planner.
    """
    sequence: MeshSize = 0
    """Devices along `sequence`, over which the tokens of a row are sharded."""
    slices: Annotated[int, Bounds(0, 2**16)] = 0
    """Slices of TPU chips, which only the data centre's network connects; `data` spans them
    first and must be a multiple of them. 0: as many as the devices lie in.
    """
    parts: tuple[tuple[Part, NamedStrategy], ...] = ()
    """Strategies of single parts in place of `strategy`, as pairs (part, strategy):
    `(("dit", "dp"),)` holds a whole DiT on each device.
    """
    cpu_devices: Annotated[int, Bounds(0, 1024)] = 0
    """JAX devices that a machine without an accelerator is divided into; 0 leaves it one device.
    XLA uses many cores better as one device each than as one device.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}
        listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
        once = list(sizes.values()).count(-1) <= 1
        check(once, f"mesh sizes {listed}: only one can be -1, which takes what is left")
