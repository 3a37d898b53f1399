"""The `shapes` suite: held-out prompts of the embedded data set, judged from pixels by its exact
scorer. The categories come in turn, so that they weigh the same.
"""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.data import shapes
from blip3o_jax.data.shapes import render, sample, score
from blip3o_jax.evaluation.judged import Judged, Prompt, tally
from blip3o_jax.pipeline import Request

SMALLEST = 32  # pixels along a side (data/shapes/detect.py)
COUNT = 300  # prompts, where none is named


def prompts(count: int | None, seed: int = 0) -> list[Prompt]:
    """`count` held-out prompts (None: COUNT), the categories in turn: {"caption", "category", ...}."""
    return shapes.prompts("test", count or COUNT, seed)


def check_size(suite: str, image_size: int) -> None:
    """UserError for images that the scorer cannot tell apart."""
    if image_size < SMALLEST:
        raise UserError(
            f"suite {suite} judges images of {SMALLEST} pixels or more: the checkpoint's model.image_size is {image_size}"
        )


def requests(asked: Sequence[Prompt], image_size: int) -> list[Request]:
    check_size("shapes", image_size)
    return [Request("t2i", prompt["caption"], size=(image_size, image_size)) for prompt in asked]


def judge(images_BHWC: np.ndarray, asked: Sequence[Prompt]) -> Judged:
    """uint8 images [B, S, S, 3] against their prompts."""
    verdicts = [score(image, prompt) for image, prompt in zip(images_BHWC, asked, strict=True)]
    return tally([v.correct for v in verdicts], [v.reason for v in verdicts], asked)


def baselines(images_BHWC: np.ndarray, asked: Sequence[Prompt], seed: int = 0) -> dict[str, Judged]:
    """What the scorer says of real images, and of unrelated ones, at the size of these."""
    count, size = images_BHWC.shape[:2]
    return {
        "real_images": judge(real_images(count, size, seed), asked),
        "random_images": judge(random_images(count, size, seed), asked),
    }


def real_images(count: int, image_size: int, seed: int = 0) -> np.ndarray:
    """The drawn images of the same prompts: what the scorer says of them bounds what any model can
    reach.
    """
    return np.stack([render(sample(seed, index, "test"), image_size) for index in range(count)])


def random_images(count: int, image_size: int, seed: int = 0) -> np.ndarray:
    """Real images of the data set, drawn without regard to the prompts: the baseline that knows the
    pictures, not the words.
    """
    return np.stack(
        [render(sample(seed + 1, index * 5 + 3, "train"), image_size) for index in range(count)]
    )
