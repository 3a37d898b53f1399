"""The `shapes` suite: held-out prompts of the embedded data set, judged from pixels by its exact scorer.

Overall is the mean over the categories, as GenEval has it; with categories in turn the prompts are balanced anyway.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from blip3o_jax.data import shapes
from blip3o_jax.data.shapes import render, sample, score

Prompt = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Judged:
    """Shares of right images per category and over all, and for each image whether it is right and why (not)."""

    overall: float
    categories: dict[str, float]
    correct: list[bool]
    reasons: list[str]


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    """`count` held-out prompts, the categories in turn: {"caption", "category", ...}."""
    return shapes.prompts("test", count, seed)


def judge(images_BHWC: np.ndarray, asked: Sequence[Prompt]) -> Judged:
    """uint8 images [B, S, S, 3] against their prompts."""
    verdicts = [score(image, prompt) for image, prompt in zip(images_BHWC, asked, strict=True)]
    names = dict.fromkeys(prompt["category"] for prompt in asked)
    categories = {
        name: float(np.mean([v.correct for v, prompt in zip(verdicts, asked, strict=True) if prompt["category"] == name]))
        for name in names
    }
    overall = float(np.mean(list(categories.values())))
    return Judged(overall, categories, [v.correct for v in verdicts], [v.reason for v in verdicts])


def real_images(count: int, image_size: int, seed: int = 0) -> np.ndarray:
    """The drawn images of the same prompts: what the scorer says of them bounds what any model can reach."""
    return np.stack([render(sample(seed, index, "test"), image_size) for index in range(count)])


def random_images(count: int, image_size: int, seed: int = 0) -> np.ndarray:
    """Real images of the data set, drawn without regard to the prompts: the baseline that knows the pictures, not the words."""
    return np.stack([render(sample(seed + 1, index * 5 + 3, "train"), image_size) for index in range(count)])
