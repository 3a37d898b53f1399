"""Score an image against its prompt of the embedded data set by the data set's scorer
(`data/shapes/scorer.py`), which evaluation uses too.

    score = w correct + (1 - w) met,   w = correct_weight

`correct` is 0 or 1 and is the goal; but images of a group that are all wrong have equal `correct`,
so prompts that the model never gets right give no gradient. `met`, the fraction of the requirements
that hold, differs between them; alone it would make a correct image worth little more than one with
a fact missing. At the default, one half, a right image is ahead of any other by at least one half.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.data.shapes.scorer import score
from blip3o_jax.data.shapes.vocabulary import CATEGORIES
from blip3o_jax.rl.rewards.options import number
from blip3o_jax.rl.rewards.reward import Reward, Scores

FIELDS = ("category", "objects", "relation", "word")  # of data/shapes/captions.py


def create(correct_weight: str = "0.5") -> "ShapesReward":
    """Make the reward for the registry."""
    return ShapesReward(number("shapes", "correct_weight", correct_weight, float, 0, 1))


@dataclasses.dataclass(frozen=True)
class ShapesReward(Reward):
    """Score by the embedded data set's rules. Parts: `correct` (0 or 1) and `shaped` (`met`
    above)."""

    correct_weight: float = 0.5

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        missing = [field for field in FIELDS if field not in metadata]
        if missing or metadata["category"] not in CATEGORIES:
            wrong = (
                f"without {', '.join(missing)}"
                if missing
                else f"of category {metadata['category']!r}"
            )
            raise UserError(
                f"reward shapes: prompt {prompt[:80]!r} is {wrong}: use the prompts_*.jsonl that "
                "are in the directory of the shapes data set"
            )

    def __call__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """Score square images of 32 pixels or more."""
        del prompts
        results = [
            score(image_HWC, dict(asked))
            for image_HWC, asked in zip(images_BHWC, metadata, strict=True)
        ]
        correct_B = np.array([result.correct for result in results], np.float32)
        met_B = np.array([result.met for result in results], np.float32)
        weight = self.correct_weight
        return Scores(
            weight * correct_B + (1 - weight) * met_B, {"correct": correct_B, "shaped": met_B}
        )
