"""The weights of a checkpoint with low-rank factors (lora.py) as those of the model without: merged as they are read."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorstore as ts

from blip3o_jax.config import ModelConfig
from blip3o_jax.lora import FACTORS, PARTS, merged_kernel
from blip3o_jax.train.checkpoint import Weights


class MergedWeights(Weights):
    """Low-rank factors are not among these; kernels that have them are read as float32 sums, which the reader rounds to what it
    stores. Everything else, and all of a checkpoint without factors, is as it was written."""

    def __init__(self, root: pathlib.Path, step: int, model: ModelConfig, *, ema: bool = False):
        super().__init__(root, step, ema=ema)
        self._scales = {part: getattr(model, part).lora.scale for part in PARTS}
        self.merged_parts = tuple(part for part in PARTS if any(self.is_merged(part, path) for _, path in self._leaves))

    def is_merged(self, part: str, path: str) -> bool:
        return path.endswith("/kernel") and (part, _factor(path, FACTORS[0])) in self._leaves

    def read(self, part: str, paths: Iterable[str]) -> dict[str, np.ndarray]:
        paths = list(paths)
        arrays = super().read(part, [path for path in paths if not self.is_merged(part, path)])
        return arrays | {path: self.open(part, path).read() for path in paths if self.is_merged(part, path)}

    def open(self, part: str, path: str) -> Any:
        """As for any parameter; a stack of sums takes the number of a layer alone."""
        if not self.is_merged(part, path):
            return super().open(part, path)
        paths = (path, *(_factor(path, name) for name in FACTORS))
        return _Sums(*(super(MergedWeights, self).open(part, p) for p in paths), self._scales[part])


@dataclasses.dataclass(frozen=True)
class _Sums:
    """W + scale A B of a stack of layers, one at a time."""

    kernel: ts.TensorStore
    a: ts.TensorStore
    b: ts.TensorStore
    scale: float

    def __getitem__(self, layer: int) -> np.ndarray:
        return merged_kernel(*(np.asarray(x[layer]) for x in (self.kernel, self.a, self.b)), self.scale)

    def read(self) -> np.ndarray:
        """All of them."""
        whole = np.empty(self.kernel.shape, np.float32)
        for layer in range(len(whole)):
            whole[layer] = self[layer]
        return whole


def _factor(kernel: str, name: str) -> str:
    """The path of a factor beside a kernel."""
    return f"{kernel.rpartition('/')[0]}/{name}"
