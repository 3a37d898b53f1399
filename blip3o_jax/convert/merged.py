"""Read a checkpoint with low-rank factors (lora.py) as the model without them, merged as it is
read.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.convert.mapping import parameter_shapes
from blip3o_jax.convert.stored_weights import StoredArray, StoredWeights
from blip3o_jax.convert.tables import PREFIXES
from blip3o_jax.lora import FACTORS, LORA_PARTS, merge_kernel


class MergedWeights(StoredWeights):
    """Read the weights of a checkpoint without its low-rank factors: a kernel that has factors is
    read as the float32 sum, which the reader rounds to what it stores. All other weights are read
    as stored.

    UserError where what is stored is not what `model` has, so that no layer is left out.
    """

    def __init__(self, root: pathlib.Path, step: int, model: ModelConfig, *, ema: bool = False):
        super().__init__(root, step, ema=ema)
        for part in [part for part in self.parts if part in PREFIXES]:
            self._check(part, parameter_shapes(part, model), root)
        self._scales = {part: getattr(model, part).lora.scale for part in LORA_PARTS}
        self.merged_parts = tuple(
            part
            for part in LORA_PARTS
            if any(self.is_merged(part, path) for _, path in self._leaves)
        )

    def _check(self, part: str, wanted: dict[str, tuple[int, ...]], root: pathlib.Path) -> None:
        stored = self.shapes(part)
        for path in [*wanted, *stored]:
            if stored.get(path) != wanted.get(path):
                kept, asked = (
                    f"{list(s[path])}" if path in s else "nothing" for s in (stored, wanted)
                )
                raise UserError(
                    f"{root}: {part}/{path} is stored as {kept}, but config.json there makes it {asked}: put back the one that "
                    "was written with the weights"
                )

    def is_merged(self, part: str, path: str) -> bool:
        return path.endswith("/kernel") and (part, _factor(path, FACTORS[0])) in self._leaves

    def read(self, part: str, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """Return all layers."""
        paths = list(paths)
        arrays = super().read(part, [path for path in paths if not self.is_merged(part, path)])
        return arrays | {
            path: self.open(part, path).read() for path in paths if self.is_merged(part, path)
        }

    def open(self, part: str, path: str) -> Any:
        """Open a parameter as in any checkpoint; a merged stack can be read layer by layer only."""
        if not self.is_merged(part, path):
            return super().open(part, path)
        paths = (path, *(_factor(path, name) for name in FACTORS))
        return _MergedStack(
            *(super(MergedWeights, self).open(part, p) for p in paths), self._scales[part]
        )


@dataclasses.dataclass(frozen=True)
class _MergedStack:
    """W + scale A B of a stack of layers, computed one at a time."""

    kernel: StoredArray
    a: StoredArray
    b: StoredArray
    scale: float

    def __getitem__(self, layer: int) -> np.ndarray:
        return merge_kernel(*(x[layer] for x in (self.kernel, self.a, self.b)), self.scale)

    def read(self) -> np.ndarray:
        """All of them."""
        whole = np.empty(self.kernel.shape, np.float32)
        for layer in range(len(whole)):
            whole[layer] = self[layer]
        return whole


def _factor(kernel: str, name: str) -> str:
    """The path of a factor beside a kernel."""
    return f"{kernel.rpartition('/')[0]}/{name}"
