"""Define rewards of the tiny runs. Every worker of a reward pool imports this file: it must not
import JAX."""

import numpy as np

PROMPTS = ("a red cat", "a small blue tall tree", "a big green boat", "pink")


def redness(images_BHWC, prompts, metadata):
    """Return how much more red than green an image is, in [-1, 1]."""
    return (images_BHWC[..., 0].astype(np.float64) - images_BHWC[..., 1]).mean(axis=(1, 2)) / 255


def redness_but_of_pink(images_BHWC, prompts, metadata):
    """Return no score for one of the prompts."""
    return np.where(
        [prompt == "pink" for prompt in prompts], np.nan, redness(images_BHWC, prompts, metadata)
    )


def redness_of_two(images_BHWC, prompts, metadata):
    """Return equal scores for all images of half of the prompts."""
    return np.where(
        [prompt in PROMPTS[:2] for prompt in prompts], redness(images_BHWC, prompts, metadata), 0
    )
