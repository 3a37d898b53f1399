"""Read a checkpoint with low-rank factors (lora.py) as the merged model without them."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.convert.mapping import parameter_shapes
from blip3o_jax.convert.stored_weights import StoredArray, StoredWeights
from blip3o_jax.convert.tables import CONVERTED_PARTS
from blip3o_jax.lora import FACTORS, LORA_PARTS, merge_kernel


class MergedWeights(StoredWeights):
    """Read the weights of a checkpoint, merging its low-rank factors.

    A kernel with factors is read as the float32 sum, which the caller rounds; all other weights are
    read as stored. Raises UserError when the stored shapes are not those of `model`, so that no
    layer is skipped.
    """

    def __init__(self, root: pathlib.Path, step: int, model: ModelConfig, *, ema: bool = False):
        super().__init__(root, step, ema=ema)
        for part in [part for part in self.parts if part in CONVERTED_PARTS]:
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
                    f"{root}: {part}/{path} is stored as {kept}, but config.json there makes it "
                    f"{asked}: restore the config.json that was written with the weights"
                )

    def is_merged(self, part: str, path: str) -> bool:
        """Return whether the parameter is a kernel with low-rank factors."""
        return path.endswith("/kernel") and (part, _factor(path, FACTORS[0])) in self._leaves

    def read(self, part: str, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """Return {path: whole array}, with merged kernels in float32."""
        paths = list(paths)
        arrays = super().read(part, [path for path in paths if not self.is_merged(part, path)])
        return arrays | {
            path: self.open(part, path).read() for path in paths if self.is_merged(part, path)
        }

    def open(self, part: str, path: str) -> Any:
        """Open a parameter for reading in slices; a merged stack is read layer by layer."""
        if not self.is_merged(part, path):
            return super().open(part, path)
        kernel, a, b = (
            super(MergedWeights, self).open(part, p)
            for p in (path, *(_factor(path, name) for name in FACTORS))
        )
        return _MergedStack(kernel, a, b, self._scales[part])


@dataclasses.dataclass(frozen=True)
class _MergedStack:
    """Compute W + scale A B of a stack of layers, one layer at a time."""

    kernel: StoredArray
    a: StoredArray
    b: StoredArray
    scale: float

    def __getitem__(self, layer: int) -> np.ndarray:
        return merge_kernel(self.kernel[layer], self.a[layer], self.b[layer], self.scale)

    def read(self) -> np.ndarray:
        """Return all layers, float32."""
        # Layer by layer: the float32 product A B of a whole stack would double the memory.
        whole = np.empty(self.kernel.shape, np.float32)
        for layer in range(len(whole)):
            whole[layer] = self[layer]
        return whole


def _factor(kernel: str, name: str) -> str:
    """Return the path of a kernel's factor."""
    return f"{kernel.rpartition('/')[0]}/{name}"
