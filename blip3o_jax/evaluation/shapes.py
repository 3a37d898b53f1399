"""Define the `shapes` suite: held-out prompts of the embedded data set, scored from pixels by
its exact scorer. The categories come in turn, so that they weigh the same.
"""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.data import shapes
from blip3o_jax.data.shapes import render, sample, score
from blip3o_jax.evaluation.result import SuitePrompt, SuiteResult, tally
from blip3o_jax.pipeline import Request

SMALLEST = 32  # pixels along a side (data/shapes/detect.py)
COUNT = 300  # prompts, where none is named


def prompts(count: int | None, seed: int = 0) -> list[SuitePrompt]:
    """Return `count` held-out prompts (None: COUNT), the categories in turn: {"caption",
    "category", ...}.
    """
    return shapes.prompts("test", count or COUNT, seed)


def check_size(suite: str, image_size: int) -> None:
    """Raise UserError for images too small for the scorer."""
    if image_size < SMALLEST:
        raise UserError(
            f"suite {suite} scores images of {SMALLEST} pixels or more: the checkpoint's "
            f"model.image_size is {image_size}"
        )


def requests(prompts: Sequence[SuitePrompt], image_size: int) -> list[Request]:
    """Return one text-to-image request a prompt, at the data set's square size."""
    check_size("shapes", image_size)
    return [Request("t2i", prompt["caption"], size=(image_size, image_size)) for prompt in prompts]


def score_outputs(images_BHWC: np.ndarray, prompts: Sequence[SuitePrompt]) -> SuiteResult:
    """Score uint8 images [B, S, S, 3] against their prompts."""
    outcomes = [score(image, prompt) for image, prompt in zip(images_BHWC, prompts, strict=True)]
    return tally([v.correct for v in outcomes], [v.reason for v in outcomes], prompts)


def baselines(
    images_BHWC: np.ndarray, prompts: Sequence[SuitePrompt], seed: int = 0
) -> dict[str, SuiteResult]:
    """Score real images, and unrelated ones, at the size of these."""
    count, size = images_BHWC.shape[:2]
    return {
        "real_images": score_outputs(real_images(count, size, seed), prompts),
        "random_images": score_outputs(random_images(count, size, seed), prompts),
    }


def real_images(count: int, image_size: int, seed: int = 0) -> np.ndarray:
    """Return the data set's images of the same prompts: their score is the upper bound of any
    model's.
    """
    return np.stack([render(sample(seed, index, "test"), image_size) for index in range(count)])


def random_images(count: int, image_size: int, seed: int = 0) -> np.ndarray:
    """Return images of the data set sampled independently of the prompts: a baseline with the
    distribution of the images and no relation to the prompts."""
    return np.stack(
        [render(sample(seed + 1, index * 5 + 3, "train"), image_size) for index in range(count)]
    )


def key_arguments(key: str) -> tuple[int, int, str]:
    """Return (seed, index, split) of a prompt's key: "test-0-000012" -> (0, 12, "test")."""
    split, seed, index = key.rsplit("-", 2)
    return int(seed), int(index), split.rpartition("-")[2]
