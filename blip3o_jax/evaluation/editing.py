"""Define the `shapes_edit` suite: edits of held-out scenes of the embedded data set, correct where
the edit is done and the rest of the image is unchanged (data/shapes/edit_scorer.py).

Baselines: the scene after the edit, and the input unchanged.
"""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.data.shapes import edit_scorer, edits, render
from blip3o_jax.evaluation.result import SuitePrompt, SuiteResult, tally
from blip3o_jax.evaluation.shapes import COUNT, check_size, key_arguments
from blip3o_jax.pipeline import Request


class ShapesEdit:
    """Evaluate edits of held-out scenes."""

    def prompts(self, count: int | None, seed: int = 0) -> list[SuitePrompt]:
        return edits.prompts("test", count or COUNT, seed)

    def requests(self, prompts: Sequence[SuitePrompt], image_size: int) -> list[Request]:
        check_size("shapes_edit", image_size)
        inputs = self._pictures(prompts, image_size, "before")
        size = (image_size, image_size)
        return [
            Request("edit", p["caption"], (image,), size)
            for p, image in zip(prompts, inputs, strict=True)
        ]

    def score_outputs(self, images_BHWC: np.ndarray, prompts: Sequence[SuitePrompt]) -> SuiteResult:
        """Score edited images; `psnr` is that of the part that the edit must not change."""
        inputs = self._pictures(prompts, images_BHWC.shape[1], "before")
        outcomes = [
            edit_scorer.score_edit(before, after, p)
            for before, after, p in zip(inputs, images_BHWC, prompts, strict=True)
        ]
        reasons = [f"{v.reason} ({v.psnr:.1f} dB)" for v in outcomes]
        return tally(
            [v.correct for v in outcomes], reasons, prompts, psnr=[v.psnr for v in outcomes]
        )

    def baselines(
        self, images_BHWC: np.ndarray, prompts: Sequence[SuitePrompt], seed: int = 0
    ) -> dict[str, SuiteResult]:
        size = images_BHWC.shape[1]
        pictures = {"real_images": "after", "input_unchanged": "before"}
        return {
            name: self.score_outputs(self._pictures(prompts, size, side), prompts)
            for name, side in pictures.items()
        }

    def _pictures(self, prompts: Sequence[SuitePrompt], image_size: int, side: str) -> np.ndarray:
        """Render the scenes before or after the edit from the prompts' keys."""
        return np.stack(
            [
                render(getattr(edits.sample_edit(*key_arguments(p["key"])), side), image_size)
                for p in prompts
            ]
        )
