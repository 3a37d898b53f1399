"""Named strategies: for each part of the model a table from logical axis to mesh axes.

The same table places parameters (by the axes declared on them), optimizer state, the batch and, through
`nn.sharding_resolver`, the activations that networks pin with `nn.constrain`. Nothing is replicated silently: a dimension
that does not divide over its mesh axes, or one mesh axis asked for twice in an array, raises and names both.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax.config import ConfigError

Table = dict[str, tuple[str, ...]]

_BATCH: Table = {"batch": ("data", "fsdp")}
_FSDP: Table = _BATCH | {"embed": ("fsdp",)}
_FSDP_TP: Table = _FSDP | {
    name: ("tensor",) for name in ("vocab", "heads", "kv_heads", "mlp", "act_vocab", "act_heads", "act_kv_heads", "act_mlp")
}

# Strategy -> part -> table; "" is the table of every part that is not named.
STRATEGIES: dict[str, dict[str, Table]] = {
    "dp": {"": _BATCH},
    "fsdp": {"": _FSDP, "vae": _BATCH},
    "fsdp_tp": {"": _FSDP_TP, "vae": _BATCH, "tokenizer": _FSDP, "text_tower": _FSDP, "patch_readout": _FSDP},
}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A named strategy on a mesh."""

    name: str
    mesh: Mesh

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ConfigError(f"mesh.strategy={self.name!r} is not one of {', '.join(STRATEGIES)}")

    @property
    def batch_shards(self) -> int:
        """Number of pieces the batch is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in _BATCH["batch"])

    def spec(self, part: str, axes: tuple[str | None, ...], shape: tuple[int, ...], where: str = "") -> PartitionSpec:
        """Mesh axes of an array of `part` whose dimensions have the logical names `axes`."""
        tables = STRATEGIES[self.name]
        table = tables.get(part, tables[""])
        entries, taken = [], {}
        for name, dim in zip(axes, shape, strict=True):
            mesh_axes = tuple(a for a in table.get(name, ()) if self.mesh.shape[a] > 1)
            for axis in mesh_axes:
                if axis in taken:
                    raise ConfigError(
                        f"strategy {self.name}: {where or part} puts both {taken[axis]!r} and {name!r} on mesh axis {axis!r}"
                    )
                taken[axis] = name
            size = math.prod(self.mesh.shape[a] for a in mesh_axes)
            if dim % size:
                raise ConfigError(
                    f"strategy {self.name}: {where or part} has {name}={dim}, which does not divide over mesh axes "
                    f"{' x '.join(mesh_axes)} = {size}; use a multiple of {size}, or a mesh whose size divides {dim}"
                )
            entries.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
        return PartitionSpec(*entries)

    def sharding(self, part: str, axes: tuple[str | None, ...], shape: tuple[int, ...], where: str = "") -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(part, axes, shape, where))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def batch_sharding(self) -> NamedSharding:
        """Sharding of every array of a batch: the leading dimension over the data axes."""
        return NamedSharding(self.mesh, PartitionSpec(_BATCH["batch"]))

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises ConfigError unless every micro-batch divides over the mesh."""
        if batch_size % (self.batch_shards * accumulate):
            raise ConfigError(
                f"data.batch_size={batch_size} does not divide over {self.batch_shards} batch shards "
                f"(mesh data={self.mesh.shape['data']} x fsdp={self.mesh.shape['fsdp']}) x {accumulate} micro-batches: "
                f"use a multiple of {self.batch_shards * accumulate}"
            )

    def parameter_shardings(self, variables: Any) -> dict[str, Any]:
        """Shardings of a state of `nnx.Param`s with logical axes, as a nested dict; the first key names the part."""
        from flax import nnx

        flat = {
            path: self.sharding(str(path[0]), v.axes, v.shape, "/".join(map(str, path)))
            for path, v in nnx.to_flat_state(variables)
        }
        return nnx.traversals.unflatten_mapping(flat)

    def resolver(self, part: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
        """Where activations lie, for `nn.sharding_resolver`."""
        return self.sharding(part, axes, shape, f"an activation of {part}")
