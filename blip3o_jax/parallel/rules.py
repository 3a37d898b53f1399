"""Resolve logical axes to mesh axes: named strategies, each with a table for every part of the
model.

The same table places parameters (by the axes declared on them), optimizer state, the batch and, in
the programs of `Strategy.jit`, the activations that networks pin with `nn.constrain`. Nothing is
replicated silently: a dimension that does not divide over its mesh axes, or two dimensions of an
array on one mesh axis, raises and names both.

    dp         parameters on every device, the batch over all
    fsdp       parameters sharded too, gathered layer by layer
    fsdp_tp    fsdp, with heads, MLP and vocabulary over `tensor`: the head's logits are never whole
               on a device
    fsdp_sp    fsdp, with the tokens of a row over `sequence`: the AR gathers keys and values,
               SANA's linear attention sums its small key-value state, its depthwise convolution
               exchanges border rows between neighbours (XLA's halo exchange)
    hybrid     fsdp within a slice; slices hold whole replicas and exchange gradients only
               (`mesh.slices`, `mesh.data`)

`hybrid_X` is any other X within a slice. The autoencoder, which only encodes, is whole on every
device unless `mesh.parts` sets another strategy: its parameters are small compared with its
activations.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax import nn
from blip3o_jax.config import ConfigError, MeshConfig, check_choice
from blip3o_jax.parallel.mesh import make_mesh, mesh_devices, slices_of
from blip3o_jax.parallel.planner import plan_groups, plan_mesh
from blip3o_jax.part_registry import PART_TABLE

Table = dict[str, tuple[str, ...]]
# Part, logical axes and shape of a parameter.
Parameter = tuple[str, tuple[str | None, ...], tuple[int, ...]]

# `lookup_batch`: the batch while embeddings are looked up. It is not sharded over the axes that
# shard the table's width: each device looks up its columns for all rows.
_BATCH: Table = {"batch": ("data", "fsdp"), "lookup_batch": ("data", "fsdp")}
_FSDP: Table = _BATCH | {"embed": ("fsdp",), "lookup_batch": ("data",)}
_FSDP_TP: Table = _FSDP | {
    name: ("tensor",)
    for name in (
        "vocab",
        "heads",
        "kv_heads",
        "mlp",
        "act_vocab",
        "act_heads",
        "act_kv_heads",
        "act_mlp",
    )
}
# The parameters are placed as in `fsdp`: only activations have a dimension of tokens.
_FSDP_SP: Table = _FSDP | {"length": ("sequence",), "latent_tokens": ("sequence",)}

TOKENS = tuple(name for name in _FSDP_SP if name not in _FSDP)
# The tables that a part's row in part_registry.py names.
TABLES = {"dp": _BATCH, "fsdp": _FSDP, "fsdp_tp": _FSDP_TP, "fsdp_sp": _FSDP_SP}

# Strategy -> part -> table; "" is the default table. Parts whose row in part_registry.py names
# another table for a strategy are added below.
STRATEGIES: dict[str, dict[str, Table]] = {
    "dp": {"": _BATCH},
    "fsdp": {"": _FSDP},
    "fsdp_tp": {"": _FSDP_TP},
    "fsdp_sp": {"": _FSDP},
}
for _part, _spec in PART_TABLE.items():
    for _strategy, _table in _spec.strategies.items():
        STRATEGIES[_strategy][_part] = TABLES[_table]
# A slice's table uses the `data` axis for the batch only, so that every slice has all parameters.
STRATEGIES |= {f"hybrid_{name}": tables for name, tables in STRATEGIES.items()} | {
    "hybrid": STRATEGIES["fsdp"]
}


def _table_of(name: str, part: str) -> Table:
    """Return the table of a part of the model in the strategy `name`."""
    tables = STRATEGIES[name]
    return tables.get(part, tables[""])


def _sharded_widths(
    name: str, parts: Mapping[str, str], parameters: Iterable[Parameter]
) -> dict[int, int]:
    """Return {dimension that lies over `fsdp`: number of parameters that have it}."""
    widths: collections.Counter[int] = collections.Counter()
    for part, axes, shape in parameters:
        table = _table_of(parts.get(part, name), part)
        for axis, dim in zip(axes, shape, strict=True):
            if axis is not None and "fsdp" in table.get(axis, ()):
                widths[dim] += math.prod(shape)
    return dict(widths)


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Hold a named strategy on a mesh; `parts` names other strategies for parts of the model."""

    name: str
    mesh: Mesh
    parts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for field, name in (
            ("strategy", self.name),
            *((f"parts[{part!r}]", name) for part, name in self.parts),
        ):
            check_choice(f"mesh.{field}", name, STRATEGIES)
        named = (self.name, *(name for _, name in self.parts))
        for axis, user in (("tensor", "fsdp_tp"), ("sequence", "fsdp_sp")):
            size = self.mesh.shape[axis]
            if size > 1 and not any(name.endswith(user) for name in named):
                raise ConfigError(
                    f"mesh.{axis}={size}: strategy {self.name} shards nothing over that axis, so"
                    f" its devices would repeat the same work; use {user}, or mesh.{axis}=1"
                )

    @classmethod
    def of(
        cls,
        cfg: MeshConfig,
        devices: Sequence[jax.Device] | None = None,
        *,
        parameters: Callable[[], Iterable[Parameter]] = tuple,
        rows: int = 0,
    ) -> "Strategy":
        """Return the strategy and the mesh of a configuration, with what it leaves open chosen for
        what `parameters` returns and `rows` of a micro-batch (planner.py). Raises ConfigError if
        they do not fit.
        """
        devices = mesh_devices(cfg, devices)
        slices = len(slices_of(devices))
        groups = plan_groups(cfg, len(devices), slices=slices, rows=rows)
        cfg = plan_mesh(
            groups,
            len(devices),
            widths=lambda: _sharded_widths(groups.strategy, dict(cfg.parts), parameters()),
        )
        if cfg.strategy.startswith("hybrid") and cfg.slices == 1:
            raise ConfigError(
                f"mesh.strategy={cfg.strategy!r} is for several slices: set mesh.slices and"
                " mesh.data to their number"
            )
        return cls(cfg.strategy, make_mesh(cfg, devices), cfg.parts)

    def describe(self) -> str:
        """Return the mesh and the strategy in one line."""
        sizes = [f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1]
        return f"mesh: {' x '.join(sizes)} of {self.mesh.size} devices, strategy {self.name}"

    @property
    def batch_shards(self) -> int:
        """Return the number of shards of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in _BATCH["batch"])

    def spec(
        self, part: str, axes: tuple[str | None, ...], shape: tuple[int, ...], where: str = ""
    ) -> PartitionSpec:
        """Return the mesh axes of an array of `part` whose dimensions have the logical names
        `axes`. Raises ConfigError for a dimension that does not divide, or a mesh axis used twice.
        """
        table = _table_of(dict(self.parts).get(part, self.name), part)
        entries: list[str | tuple[str, ...] | None] = []
        # A mesh axis can shard one dimension of an array only; XLA's own error names neither
        # dimension.
        taken: dict[str, str | None] = {}
        for name, dim in zip(axes, shape, strict=True):
            # A single token, of decoding or of the unconditional branch, cannot be sharded.
            sharded = name is not None and (dim != 1 or name not in TOKENS)
            candidates = table.get(name, ()) if name is not None and sharded else ()
            # Axes of size 1 are left out, so that equal placements have equal specs on every mesh.
            mesh_axes = tuple(a for a in candidates if self.mesh.shape[a] > 1)
            for axis in mesh_axes:
                if axis in taken:
                    raise ConfigError(
                        f"strategy {self.name}: {where or part} puts both {taken[axis]!r} and"
                        f" {name!r} on mesh axis {axis!r}"
                    )
                taken[axis] = name
            size = math.prod(self.mesh.shape[a] for a in mesh_axes)
            if dim % size:
                raise ConfigError(
                    f"strategy {self.name}: {where or part} has {name}={dim}, which does not divide"
                    f" over mesh axes {' x '.join(mesh_axes)} = {size}; use a multiple of {size},"
                    f" or a mesh whose size divides {dim}"
                )
            entries.append(
                mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None)
            )
        return PartitionSpec(*entries)

    def sharding(
        self, part: str, axes: tuple[str | None, ...], shape: tuple[int, ...], where: str = ""
    ) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(part, axes, shape, where))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def batch_sharding(self) -> NamedSharding:
        """Return the sharding of every array of a batch: the leading dimension over the data
        axes.
        """
        return NamedSharding(self.mesh, PartitionSpec(_BATCH["batch"]))

    def check_batch(self, batch_size: int, accumulate: int = 1, pack: int = 1) -> None:
        """Raise ConfigError unless every micro-batch, in rows of `pack` examples, divides over the
        mesh.
        """
        if batch_size % (self.batch_shards * accumulate * pack):
            rows = "" if pack == 1 else f" x {pack} examples a row"
            raise ConfigError(
                f"data.batch_size={batch_size} does not divide over {self.batch_shards} batch"
                f" shards (mesh data={self.mesh.shape['data']} x fsdp={self.mesh.shape['fsdp']}) x"
                f" {accumulate} micro-batches{rows}: use a multiple of"
                f" {self.batch_shards * accumulate * pack}"
            )

    def parameter_shardings(self, variables: Any) -> dict[str, Any]:
        """Return the shardings of a state of `nnx.Param`s with logical axes, as a nested dict; the
        first key names the part.
        """
        flat = {
            path: self.sharding(str(path[0]), v.axes, v.shape, "/".join(map(str, path)))
            for path, v in nnx.to_flat_state(variables)
        }
        return nnx.traversals.unflatten_mapping(flat)

    def jit(self, fn: Callable[..., Any], **options: Any) -> Any:
        """Return `jax.jit(fn, **options)` that places activations by this strategy: every
        activation that `fn` pins with `nn.constrain` has its sharding in the program.

        Every program that runs a network is compiled through this; tests/parallel/test_jit.py lists
        the exceptions, with the reason for each.
        """

        @functools.wraps(fn)
        def placed(*args: Any, **kwargs: Any) -> Any:
            with nn.sharding_resolver(self.resolver):
                return fn(*args, **kwargs)

        return jax.jit(placed, **options)

    def resolver(
        self, part: str, axes: tuple[str | None, ...], shape: tuple[int, ...]
    ) -> NamedSharding:
        """Return the sharding of an activation, for `nn.sharding_resolver`."""
        return self.sharding(part, axes, shape, f"an activation of {part}")
