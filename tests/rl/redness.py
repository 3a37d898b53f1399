"""Define rewards of the tiny runs. Every worker of a reward pool imports this file: it must not
import JAX."""

import numpy as np

# Digits of a score. A float32 rounding, as between meshes, can move one pixel to the next of 255
# levels. That changes the mean of 16 x 16 pixels by 1.5e-5 and, through the advantage, which
# divides by the group's deviation, all gradients of the update by 1.6e-4. Three digits stay the
# same, unless the mean is within 1.5e-5 of the middle between two of them.
DIGITS = 3

PROMPTS = ("a red cat", "a small blue tall tree", "a big green boat", "pink")


def redness(images_BHWC, prompts, metadata):
    """Return how much more red than green an image is, in [-1, 1]."""
    difference_BHW = images_BHWC[..., 0].astype(np.float64) - images_BHWC[..., 1]
    return np.round(difference_BHW.mean(axis=(1, 2)) / 255, DIGITS)


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
