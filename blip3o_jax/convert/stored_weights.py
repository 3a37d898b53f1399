"""Read the parameters in a checkpoint's files as NumPy arrays, for conversion."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from blip3o_jax.config import UserError
from blip3o_jax.lora import FACTORS
from blip3o_jax.train.checkpoint import reading
from blip3o_jax.train.checkpoint_steps import check_intact


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Read one parameter in a checkpoint's files in slices.

    Chunks that were read stay cached while the object exists. `name` is for error messages.
    """

    name: str
    array: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the parameter's shape."""
        return self.array.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        with reading(self.name):
            return self.array[index].read().result()

    def read(self) -> np.ndarray:
        """Return the whole array."""
        return self[...]


class StoredWeights:
    """Read the parameters of one step lazily.

    `parts` are the parts in the checkpoint. `ema` reads averaged parameters in place of the trained
    ones. Raises UserError for damaged files, or without averages.
    """

    def __init__(self, root: pathlib.Path, step: int, *, ema: bool = False):
        check_intact(root, step)
        self._path = (root / str(step) / "state").absolute()
        with reading(str(self._path)):
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self._path)).tree
            if ema and not tree.get("ema"):
                raise UserError(
                    f"{root} holds no averaged weights: it was trained with optimizer.ema_decay=0; "
                    "remove --ema"
                )
            # (part, path within it) -> (group, shape and dtype)
            self._leaves = {
                (keys[0], "/".join(keys[1:])): (group, leaf)
                for group in ("frozen", "ema" if ema else "params")
                for keys, leaf in _flat_metadata(tree.get(group) or {})
            }
        self.parts = tuple(dict.fromkeys(part for part, _ in self._leaves))

    def dtype(self, part: str) -> np.dtype:
        """Return the dtype of a part's parameters, which all but LoRA factors share."""
        leaves = ((path, leaf) for (name, path), (_, leaf) in self._leaves.items() if name == part)
        return np.dtype(next(leaf.dtype for path, leaf in leaves if not path.endswith(FACTORS)))

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Return {path: shape} of all parameters of a part, including LoRA factors."""
        return {
            path: tuple(leaf.shape)
            for (name, path), (_, leaf) in self._leaves.items()
            if name == part
        }

    def read(self, part: str, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """Return {path: whole array} of parameters, read concurrently; KeyError if absent."""
        opened = {path: self.open(part, path) for path in paths}
        futures = {path: (stored.name, stored.array.read()) for path, stored in opened.items()}
        arrays = {}
        for path, (name, future) in futures.items():
            with reading(name):
                arrays[path] = future.result()
        return arrays

    def open(self, part: str, path: str) -> StoredArray:
        """Open a parameter for reading in slices; KeyError if it is absent."""
        group, _ = self._leaves[part, path]
        files = {"driver": "file", "path": f"{self._path}/"}
        store = {
            "driver": "ocdbt",
            "base": files,
            # Orbax joins the keys of a parameter's path with dots.
            "path": ".".join((group, part, *path.split("/"))),
        }
        # A cache without limit for each array: slices of one chunk, read layer by layer, decode the
        # chunk once. It is freed with the array.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 2**62}})
        name = f"{self._path}: {part}/{path}"
        with reading(name):
            array = ts.open(
                {"driver": "zarr", "kvstore": store}, context=context, open=True, read=True
            ).result()
        return StoredArray(name, array)


def _flat_metadata(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (keys, leaf) of the nested dicts and lists that Orbax returns."""
    children = (
        enumerate(tree)
        if isinstance(tree, list | tuple)
        else tree.items()
        if isinstance(tree, dict)
        else None
    )
    if children is None:
        yield keys, tree
        return
    for key, child in children:
        yield from _flat_metadata(child, (*keys, str(key)))
