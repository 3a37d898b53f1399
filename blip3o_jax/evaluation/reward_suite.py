"""Define a suite for any reward of reinforcement learning (docs/rl.md): prompts from a file, scored
as in `blip3o rl`.

An image is correct by the reward's part "correct" or "exact", or, for a reward that has neither, by
a score of at least `CORRECT`. Images that cannot be scored count as wrong, with the reason.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.data.prompts import read_prompts
from blip3o_jax.evaluation.result import SuitePrompt, SuiteResult, tally
from blip3o_jax.pipeline import Request
from blip3o_jax.rl.rewards.pool import REASONS_SHOWN, RewardPool

CORRECT = 0.5
CORRECT_PARTS = ("correct", "exact")


@dataclasses.dataclass(frozen=True)
class RewardSuite:
    """Score `images_per_prompt` images for each prompt of a file (GenEval uses 4) by a reward."""

    reward: RewardConfig
    prompts_file: pathlib.Path
    images_per_prompt: int = 1

    def prompts(self, count: int | None, seed: int = 0) -> list[SuitePrompt]:
        """Return the file's first `count` prompts, or all (None); UserError for one that the reward
        cannot score, before anything is sampled.
        """
        del seed  # the file's order is the benchmark's
        found = read_prompts(self.prompts_file)[:count]
        with RewardPool((self.reward,), workers=1) as pool:
            pool.check([(prompt.text, prompt.metadata) for prompt in found])
        return [
            {
                "caption": prompt.text,
                "category": prompt.category or "all",
                "metadata": prompt.metadata,
            }
            for prompt in found
            for _ in range(self.images_per_prompt)
        ]

    def requests(self, prompts: Sequence[SuitePrompt], image_size: int) -> list[Request]:
        del image_size  # there are no reference images
        return [Request("t2i", prompt["caption"]) for prompt in prompts]

    def score_outputs(self, images_BHWC: np.ndarray, prompts: Sequence[SuitePrompt]) -> SuiteResult:
        with RewardPool((self.reward,)) as pool:
            found = pool.submit(
                images_BHWC, [p["caption"] for p in prompts], [p["metadata"] for p in prompts]
            ).result()
        if found.failed_B.all():
            failures = "; ".join(list(found.reasons)[:REASONS_SHOWN])
            raise UserError(f"none of {len(prompts)} images could be scored: {failures}")
        parts = {
            name.rpartition("/")[2]: part_B for name, part_B in found.parts.items() if "/" in name
        }
        named = next((parts[name] for name in CORRECT_PARTS if name in parts), found.total_B)
        correct_B = ~found.failed_B & (named >= CORRECT)
        reasons = [
            "not scored"
            if failed
            else ", ".join(f"{name} {part_B[i]:.3g}" for name, part_B in parts.items())
            for i, failed in enumerate(found.failed_B)
        ]
        return tally(
            correct_B.tolist(), reasons, prompts, score=np.where(found.failed_B, 0, found.total_B)
        )

    def baselines(
        self, images_BHWC: np.ndarray, prompts: Sequence[SuitePrompt], seed: int = 0
    ) -> dict[str, SuiteResult]:
        """Score the same images, each for another prompt."""
        del seed
        others = np.roll(images_BHWC, self.images_per_prompt, axis=0)
        return {"images_of_other_prompts": self.score_outputs(others, prompts)}
