"""Define the interface of a reward: a batch of images, their prompts and metadata -> one score an
image, and named parts of it.

A reward runs in processes that must start fast: no module imported at its top may import jax,
tensorflow or torch.

Shape suffixes: B images, H height, W width, C colour channels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Scores:
    """Hold `total_B` float32 [B], and named parts of it, float32 [B] each, for metrics."""

    total_B: np.ndarray
    parts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Reward(Protocol):
    """Score images. The built-in rewards are named in `registry`. A class that derives from this
    one inherits a `check` that accepts all prompts."""

    def __call__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """Score uint8 RGB images [B, H, W, 3]; `metadata`: each prompt's line of the prompts file.
        Higher is better."""
        ...

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise UserError for a prompt that it cannot score; called for every prompt of a run
        before the run starts.
        """
        return  # accept all prompts
