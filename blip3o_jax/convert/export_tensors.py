"""Write a checkpoint's parameters as named tensors, reading them in groups.

Small parameters are read together, since every read has overhead; large stacks and tables are read
layer by layer or a few rows at a time, so that the whole and its pieces are never both in memory.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.convert.mapping import Group
from blip3o_jax.convert.merged import MergedWeights
from blip3o_jax.convert.progress import ByteProgress
from blip3o_jax.convert.tables import EMBEDDINGS, HEAD, Shape
from blip3o_jax.convert.tensor_files import Tensor, cast
from blip3o_jax.convert.tensor_writer import ShardedWriter

PARALLEL_READ_BYTES = 2**27  # parameters up to this total size are read together


@dataclasses.dataclass(frozen=True)
class PlannedGroup:
    """Hold a group of parameters and the tensors to write it as.

    `shapes` and `dtypes` are by the tensors' full names, in the order of the layers.
    """

    part: str
    group: Group
    shapes: dict[str, Shape]
    dtypes: dict[str, np.dtype]

    @property
    def size(self) -> int:
        """Return the tensors' size in bytes."""
        return sum(
            math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()
        )

    @property
    def by_rows(self) -> bool:
        """Return whether this is a table that is too large to convert at once."""
        return self.size > PARALLEL_READ_BYTES and self.group.rule.by_rows


def write_tensors(
    directory: pathlib.Path,
    stem: str,
    planned: Sequence[PlannedGroup],
    constants: Mapping[str, Tensor],
    weights: MergedWeights,
    *,
    tied_head: bool,
    max_shard_bytes: int,
) -> tuple[int, int]:
    """Write STEM*.safetensors under `directory`; return (bytes, number of tensors).

    `constants` are written after the parameters. With `tied_head` the embeddings are also written
    as lm_head.weight.
    """
    specs: dict[str, tuple[Shape, np.dtype]] = {
        name: (shape, plan.dtypes[name]) for plan in planned for name, shape in plan.shapes.items()
    }
    tied = tied_head and EMBEDDINGS in specs
    if tied:
        specs[HEAD] = specs[EMBEDDINGS]
    specs |= {name: (tensor.shape, tensor.dtype) for name, tensor in constants.items()}
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    writer = ShardedWriter(directory, stem, specs, max_shard_bytes)
    try:
        with ByteProgress("write", size) as progress:
            for plan, arrays in _read(planned, weights):
                for name, first, tensor in _converted(plan, arrays):
                    # A file that stored the tied head gets it again.
                    for place in (name, HEAD) if tied and name == EMBEDDINGS else (name,):
                        if plan.by_rows:
                            writer.write_rows(place, tensor, first)
                        else:
                            writer.write(place, tensor)
                    progress.add(plan.part, tensor.nbytes)
                # Released before the next group is read, so that two groups are never in memory.
                del arrays, tensor
        for name, constant in constants.items():
            writer.write(name, constant.read())
    except BaseException:
        writer.abort()
        raise
    writer.close()
    return size, len(specs)


def _read(
    planned: Sequence[PlannedGroup], weights: MergedWeights
) -> Iterator[tuple[PlannedGroup, dict[str, Any]]]:
    """Yield each group of tensors with its parameters: arrays, or lazily opened ones."""
    waiting: list[PlannedGroup] = []
    for i, plan in enumerate(planned):
        waiting.append(plan)
        following = planned[i + 1] if i + 1 < len(planned) else None
        together = [*waiting, following] if following is not None else waiting
        if (
            following is not None
            and following.part == plan.part
            and sum(p.size for p in together) <= PARALLEL_READ_BYTES
        ):
            continue
        paths = [path for p in waiting for path in p.group.shapes]
        if plan.by_rows or (plan.group.rule.stacked and plan.size > PARALLEL_READ_BYTES):
            arrays = {path: weights.open(plan.part, path) for path in paths}
        else:
            arrays = weights.read(plan.part, paths)
        for ready in waiting:
            yield ready, {path: arrays.pop(path) for path in ready.group.shapes}
        waiting = []


def _converted(plan: PlannedGroup, arrays: dict[str, Any]) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield (name, first row, rows): whole tensors, or a large table a few rows at a time."""
    for layer, (name, shape) in enumerate(plan.shapes.items()):
        if plan.by_rows:
            (table,) = arrays.values()
            step = max(1, shape[0] * PARALLEL_READ_BYTES // plan.size)
            for first in range(0, shape[0], step):
                some = slice(first, min(first + step, shape[0]))
                rows = table[:, some].T if plan.group.rule.transposed else table[some]
                yield name, first, cast(name, rows, plan.dtypes[name])
        else:
            pieces = {
                path: a[layer] if plan.group.rule.stacked else a for path, a in arrays.items()
            }
            yield name, 0, cast(name, plan.group.to_torch(pieces, shape), plan.dtypes[name])
