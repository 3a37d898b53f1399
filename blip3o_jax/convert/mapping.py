"""Resolve a part's table (conversions.py) to the names and shapes of PyTorch's tensors.

Shapes come from the abstract model. A table that misses a parameter or names one twice raises
AssertionError.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from blip3o_jax.blip3o import Blip3o, path_name
from blip3o_jax.config import ModelConfig
from blip3o_jax.convert.conversions import rules
from blip3o_jax.convert.tables import LAYOUTS, Rule, Shape


@dataclasses.dataclass(frozen=True)
class Group:
    """Hold a rule with its shapes: parameters, and the tensors that hold their values."""

    rule: Rule
    shapes: dict[str, Shape]  # of the parameters, by path, including the axis of the layers
    tensors: dict[str, Shape]  # of the tensors, by name, in the order of the layers

    def to_jax(self, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, piece of that parameter) of one tensor, as views where possible.

        A vocabulary table's piece lacks the padding rows.
        """
        layout = LAYOUTS[self.rule.layout]
        for path, piece in zip(
            self.rule.paths, np.split(tensor, len(self.rule.paths)), strict=True
        ):
            yield path, layout.to_jax(piece)

    def to_torch(self, pieces: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        """Return the tensor of one layer's pieces without padding rows: the inverse of `to_jax`."""
        layout = LAYOUTS[self.rule.layout]
        tensors = [layout.to_torch(pieces[path]) for path in self.rule.paths]
        tensor = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        return tensor[: shape[0]] if self.rule.vocabulary else tensor


@functools.lru_cache(maxsize=32)
def groups(part: str, cfg: ModelConfig) -> tuple[Group, ...]:
    """Return every rule of a part's table with its shapes."""
    shapes = parameter_shapes(part, cfg)
    found: list[Group] = []
    taken: set[str] = set()
    for rule in rules(part, cfg):
        own = {path: shapes[path] for path in rule.paths}
        if again := taken & set(own):
            raise AssertionError(f"the table of {part} names {again} twice")
        taken |= set(own)
        count = next(iter(own.values()))[0] if rule.stacked else 1
        first, *rest = (
            LAYOUTS[rule.layout].torch_shape(shape[1:] if rule.stacked else shape)
            for shape in own.values()
        )
        rows = cfg.ar.vocab_size if rule.vocabulary else first[0] + sum(s[0] for s in rest)
        found.append(
            Group(rule, own, {rule.key(layer): (rows, *first[1:]) for layer in range(count)})
        )
    if missing := sorted(set(shapes) - taken):
        raise AssertionError(f"the table of {part} does not name {missing}")
    return tuple(found)


def parameter_shapes(part: str, cfg: ModelConfig) -> dict[str, Shape]:
    """Return {path within the part: shape} of a part's parameters."""
    # Shapes only: a model of any size is described without memory.
    state = nnx.eval_shape(lambda: nnx.state(Blip3o(cfg, (part,), seed=0)))
    return {path_name(path[1:]): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(state)}


def tensor_shapes(part: str, cfg: ModelConfig) -> dict[str, Shape]:
    """Return {tensor name without prefix: shape}."""
    return {key: shape for group in groups(part, cfg) for key, shape in group.tensors.items()}


def to_jax(part: str, cfg: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert a part's tensors (weights or gradients) to {path: array}.

    Layers are stacked and vocabulary tables padded with zero rows. Raises KeyError for a missing
    tensor.
    """
    arrays = {}
    for group in groups(part, cfg):
        for path, shape in group.shapes.items():
            # Zeros, for the padding rows that no tensor fills.
            arrays[path] = np.zeros(shape, np.asarray(tensors[next(iter(group.tensors))]).dtype)
        for layer, key in enumerate(group.tensors):
            for path, piece in group.to_jax(np.asarray(tensors[key])):
                target = arrays[path][layer] if group.rule.stacked else arrays[path]
                target[tuple(slice(n) for n in piece.shape)] = piece
    return arrays


def to_torch(
    part: str, cfg: ModelConfig, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Convert {path: array} of a part to {tensor name: tensor}: the inverse of `to_jax`."""
    tensors = {}
    for group in groups(part, cfg):
        for layer, (key, shape) in enumerate(group.tensors.items()):
            pieces = {path: np.asarray(arrays[path]) for path in group.shapes}
            tensors[key] = group.to_torch(
                {p: a[layer] if group.rule.stacked else a for p, a in pieces.items()}, shape
            )
    return tensors


def flat(tree: object) -> dict[str, jax.Array]:
    """Flatten a nested dict of arrays to {path: array}."""
    return {
        "/".join(str(k.key) for k in keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
