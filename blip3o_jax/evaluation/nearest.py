"""Compare samples with real pictures by the mean squared error over pixels: find the nearest
picture of a training set, and whether a sample is nearest to the picture of its own caption.

Legend: B images, N real pictures, D = H W C values of an image.
"""

import numpy as np

CHOICES = 10  # pictures that a sample is compared with: its own, and those of other captions


def squared_errors(images_BHWC: np.ndarray, pictures_NHWC: np.ndarray) -> np.ndarray:
    """Return the mean squared error over pixels of each image and picture, uint8, of values in
    [0, 255]: float32 [B, N].
    """
    # Centred at 0: the expansion below subtracts sums of squares, and smaller ones lose fewer
    # digits.
    a_BD, b_ND = (
        x.reshape(len(x), -1).astype(np.float32) - 127.5 for x in (images_BHWC, pictures_NHWC)
    )
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b: an array of the differences would have B N D elements.
    squares_BN = (a_BD**2).sum(1)[:, None] + (b_ND**2).sum(1)[None] - 2 * (a_BD @ b_ND.T)
    # Rounding may leave a small negative value for equal images.
    return np.maximum(squares_BN, 0) / a_BD.shape[1]


def nearest(images_BHWC: np.ndarray, pictures_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the nearest picture of each image, int64 [B], and the root mean square
    error, float32 [B]; of equally near pictures the first.
    """
    errors_BN = squared_errors(images_BHWC, pictures_NHWC)
    which_B = errors_BN.argmin(axis=1)
    return which_B, np.sqrt(errors_BN[np.arange(len(which_B)), which_B])


def matched(
    samples_BHWC: np.ndarray, truths_BHWC: np.ndarray, choices: int = CHOICES, seed: int = 0
) -> np.ndarray:
    """Return whether each sample is nearer to its own picture than to those of `choices` - 1 others
    that are drawn from the rest: bool [B]. By chance a fraction of 1 / `choices` is.
    """
    errors_BB = squared_errors(samples_BHWC, truths_BHWC)
    rng = np.random.default_rng(seed)
    right = []
    for row, errors_B in enumerate(errors_BB):
        others = np.delete(np.arange(len(errors_BB)), row)
        chosen = rng.choice(others, min(choices - 1, len(others)), replace=False)
        # Strict, so that equal pictures of other captions are no match.
        right.append(bool((errors_B[row] < errors_B[chosen]).all()))
    return np.array(right)
