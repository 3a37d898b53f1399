"""List the largest arrays of a compiled program, and those arrays that sharding should prevent.

Every operation's result is checked, with its shape on the device: the layers of a part gathered
together, where each should be gathered in its iteration; the table of embeddings or its gradient,
where each device should hold its columns only; and the logits of all labelled positions, where
cross entropy takes them in blocks.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax.bench.cost import hlo
from blip3o_jax.bench.cost.hlo import Program, Shape

GATHERED = ("data", "fsdp")  # mesh axes


@dataclasses.dataclass(frozen=True)
class Logits:
    """Describe the logits of all labelled positions of a device: their number, each with `columns`
    of the `vocabulary`, or with all of it. The head is [`width`, `columns`]."""

    positions: int
    columns: int
    vocabulary: int
    width: int

    def matches(self, shape: Shape) -> bool:
        columns = next((n for n in (self.columns, self.vocabulary) if n in shape.dims), 0)
        rows = shape.size // columns if columns else 0
        return rows >= self.positions and rows != self.width


def largest(program: Program, count: int = 5) -> list[dict[str, Any]]:
    """Return the largest results of single operations, each shape once: {"array", "bytes",
    "of"}."""
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for op, shape in _results(program):
        name = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
        found.setdefault(
            (shape.dtype, shape.dims),
            {"array": name, "bytes": shape.bytes, "of": op.op_name or op.opcode},
        )
    return sorted(found.values(), key=lambda row: -row["bytes"])[:count]


def unsharded(
    program: Program, weights: Any, logits: Logits | None = None, products: str = "bfloat16"
) -> list[str]:
    """Return a line for each array that the program holds and sharding should prevent; empty when
    all is well.

    `weights`: ShapeDtypeStructs with shardings, as the program is given them. A matrix by itself
    may be gathered, and a table that is the head too, in the dtype of `products`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    given = {
        _dims(leaf.sharding.shard_shape(leaf.shape)) for _, leaf in leaves
    }  # no sign of anything
    stacks: dict[tuple[int, ...], list[str]] = {}
    tables: dict[tuple[int, ...], str] = {}
    for path, leaf in leaves:
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        for dims in {_dims(_gathered(leaf)), _dims(leaf.shape)} - given:
            if len(leaf.shape) - leaf.shape.count(1) > 2:
                stacks.setdefault(dims, []).append(name)
            elif name.endswith("/embedding"):
                tables[dims] = name
    found: dict[str, None] = {}
    for op, shape in _results(program):
        if names := stacks.get(_dims(shape.dims)):
            found[
                f"all layers of {' or '.join(names)} are gathered at once: "
                f"{shape.dtype}{list(shape.dims)}"
            ] = None
        if (
            shape.dtype == "f32"
            and products != "float32"
            and (table := tables.get(_dims(shape.dims)))
        ):
            found[
                f"{table} or its gradient is held whole by {op.op_name or op.opcode}: "
                f"f32{list(shape.dims)}"
            ] = None
        if logits and logits.matches(shape):
            found[
                f"the logits of all {logits.positions} positions are held at once by "
                f"{op.op_name or op.opcode}"
            ] = None
    return list(found)


def _gathered(leaf: Any) -> tuple[int, ...]:
    """Return the shape on a device after a strategy has gathered the leaf for the products: over
    the axes that also shard the batch. Dimensions sharded over others, such as heads, stay sharded.
    """
    spec = [
        tuple(
            axis
            for axis in ((entry,) if isinstance(entry, str) else entry or ())
            if axis not in GATHERED
        )
        for entry in leaf.sharding.spec
    ]
    return NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec)).shard_shape(leaf.shape)


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dimensions sorted, since layouts are the compiler's choice, without those of size
    one: an array that a layer keeps of a single row is no weight."""
    return tuple(sorted(shape))


def _results(program: Program) -> list[tuple[hlo.Op, Shape]]:
    """Return the results that lie in memory: of operations that are scheduled, not of those within
    a fusion.
    """
    inner = {
        name
        for c in program.computations.values()
        for op in c.ops
        if op.opcode == "fusion"
        for name in op.called("calls")
    }
    return [
        (op, shape)
        for name, computation in program.computations.items()
        if name not in inner
        for op in computation.ops
        for shape in hlo.leaves(op.shape)
        if math.prod(shape.dims) > 1
    ]
