"""Define the `reconstruct` suite: held-out scenes of the embedded data set reconstructed from their
tokens.

PSNR in dB and SSIM; correct where the scorer of text to image finds what the scene's caption asks
for. Baselines: the scene itself, and another scene.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from blip3o_jax.data import shapes
from blip3o_jax.data.shapes import edit_scorer, render
from blip3o_jax.evaluation.result import SuitePrompt, SuiteResult, tally
from blip3o_jax.evaluation.shapes import COUNT, check_size, key_arguments
from blip3o_jax.pipeline import Request


class Reconstruct:
    """Evaluate reconstructions of held-out scenes."""

    def prompts(self, count: int | None, seed: int = 0) -> list[SuitePrompt]:
        return shapes.prompts("test", count or COUNT, seed)

    def requests(self, prompts: Sequence[SuitePrompt], image_size: int) -> list[Request]:
        check_size("reconstruct", image_size)
        size = (image_size, image_size)
        return [
            Request("reconstruct", "", (image,), size)
            for image in self._originals(prompts, image_size)
        ]

    def score_outputs(self, images_BHWC: np.ndarray, prompts: Sequence[SuitePrompt]) -> SuiteResult:
        originals = self._originals(prompts, images_BHWC.shape[1])
        outcomes = [shapes.score(image, p) for image, p in zip(images_BHWC, prompts, strict=True)]
        pairs = list(zip(originals, images_BHWC, strict=True))
        found = [(edit_scorer.psnr(*pair), ssim(*pair)) for pair in pairs]
        reasons = [
            f"{db:.1f} dB, SSIM {similar:.3f}, {v.reason}"
            for (db, similar), v in zip(found, outcomes, strict=True)
        ]
        psnrs, ssims = zip(*found, strict=True)
        return tally([v.correct for v in outcomes], reasons, prompts, psnr=psnrs, ssim=ssims)

    def baselines(
        self, images_BHWC: np.ndarray, prompts: Sequence[SuitePrompt], seed: int = 0
    ) -> dict[str, SuiteResult]:
        originals = self._originals(prompts, images_BHWC.shape[1])
        return {
            "real_images": self.score_outputs(originals, prompts),
            "images_of_other_prompts": self.score_outputs(np.roll(originals, 1, 0), prompts),
        }

    def _originals(self, prompts: Sequence[SuitePrompt], image_size: int) -> np.ndarray:
        return np.stack(
            [render(shapes.sample(*key_arguments(p["key"])), image_size) for p in prompts]
        )


def ssim(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    """Return the structural similarity (Wang et al. 2004) of uint8 images: windows with a deviation
    of 1.5 pixels, mean over colours.
    """
    # float64: a variance is a difference of two large means.
    a, b = (x.astype(np.float64) for x in (a_HWC, b_HWC))
    # The paper's window, 11 x 11 pixels.
    blur = lambda x: cv2.GaussianBlur(x, (11, 11), 1.5)
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    # The paper's K1 and K2, for values up to 255; they bound the quotients where an area is flat.
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(
        np.mean(
            (2 * mean_a * mean_b + c1)
            * (2 * covariance + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    )
