"""Suites of any reward of reinforcement learning (docs/rl.md): prompts from a file, judged as a run
of `blip3o rl` is.

An image is right where the reward says so: by its part "correct" or "exact", or, for one that has
neither, by a score of at least `CORRECT`. Images that cannot be judged are wrong, with the reason.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.data.prompts import read_prompts
from blip3o_jax.evaluation.judged import Judged, Prompt, tally
from blip3o_jax.pipeline import Request
from blip3o_jax.rl.rewards.pool import REASONS_SHOWN, RewardPool

CORRECT = 0.5
VERDICTS = ("correct", "exact")


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """Each of the file's prompts has `images_per_prompt` images, GenEval's benchmark 4."""

    reward: RewardConfig
    prompts_file: pathlib.Path
    images_per_prompt: int = 1

    def prompts(self, count: int | None, seed: int = 0) -> list[Prompt]:
        """The file's first `count`, or all (None); UserError for one that the reward cannot judge,
        before anything is drawn.
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

    def requests(self, asked: Sequence[Prompt], image_size: int) -> list[Request]:
        del image_size  # nothing is shown
        return [Request("t2i", prompt["caption"]) for prompt in asked]

    def judge(self, images_BHWC: np.ndarray, asked: Sequence[Prompt]) -> Judged:
        with RewardPool((self.reward,)) as pool:
            found = pool.submit(
                images_BHWC, [p["caption"] for p in asked], [p["metadata"] for p in asked]
            ).result()
        if found.failed_B.all():
            reasons = "; ".join(list(found.reasons)[:REASONS_SHOWN])
            raise UserError(f"none of {len(asked)} images could be judged: {reasons}")
        parts = {
            name.rpartition("/")[2]: part_B for name, part_B in found.parts.items() if "/" in name
        }
        named = next((parts[name] for name in VERDICTS if name in parts), found.total_B)
        correct_B = ~found.failed_B & (named >= CORRECT)
        told = [
            "not judged"
            if failed
            else ", ".join(f"{name} {part_B[i]:.3g}" for name, part_B in parts.items())
            for i, failed in enumerate(found.failed_B)
        ]
        return tally(
            correct_B.tolist(), told, asked, score=np.where(found.failed_B, 0, found.total_B)
        )

    def baselines(
        self, images_BHWC: np.ndarray, asked: Sequence[Prompt], seed: int = 0
    ) -> dict[str, Judged]:
        """The same images, each for another prompt."""
        del seed
        others = np.roll(images_BHWC, self.images_per_prompt, axis=0)
        return {"images_of_other_prompts": self.judge(others, asked)}
