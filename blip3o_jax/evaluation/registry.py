"""Map the names of `--suite` to evaluation suites; a new suite is a `Suite` and a row of SUITES."""

import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from blip3o_jax.config import UserError, check_choice
from blip3o_jax.evaluation import shapes
from blip3o_jax.evaluation.editing import ShapesEdit
from blip3o_jax.evaluation.reconstruction import Reconstruct
from blip3o_jax.evaluation.result import SuitePrompt, SuiteResult
from blip3o_jax.evaluation.reward_suite import RewardSuite
from blip3o_jax.evaluation.understanding import ShapesQa
from blip3o_jax.pipeline import Request
from blip3o_jax.rl.rewards.registry import REWARDS, parsed


class Suite(Protocol):
    """Define a suite: its prompts, the requests to the model, and the scores of the outputs in the
    order of the prompts, which are uint8 images [B, H, W, 3] or texts."""

    def prompts(self, count: int | None, seed: int) -> list[SuitePrompt]:
        """Return `count` prompts; None: as many as the suite has, or its default."""
        ...

    def requests(self, prompts: Sequence[SuitePrompt], image_size: int) -> list[Request]:
        """Return one request a prompt. `image_size` is `model.image_size`, a side in pixels. Scenes
        of the embedded data set are squares of this side, independent of the model's image sizes.
        """
        ...

    def score_outputs(self, outputs: Any, prompts: Sequence[SuitePrompt], /) -> SuiteResult: ...

    def baselines(
        self, outputs: Any, prompts: Sequence[SuitePrompt], seed: int, /
    ) -> dict[str, SuiteResult]:
        """Return results of other outputs for the same prompts, to compare the model's with."""
        ...


SUITES: dict[str, Suite] = {
    "shapes": shapes,
    "shapes_edit": ShapesEdit(),
    "shapes_qa": ShapesQa(),
    "reconstruct": Reconstruct(),
}


def find_suite(
    name: str, prompts_file: str | pathlib.Path | None = None, images_per_prompt: int = 1
) -> Suite:
    """Return the suite `name`: one of SUITES, which have prompts, or a reward with its options,
    "ocr,scoring=reference", for the prompts of a file. UserError for another name, or a file that
    is missing or not needed."""
    reward = name.partition(",")[0]
    # "shapes" is a suite and a reward: a file of prompts selects the reward.
    if name in SUITES and prompts_file is None:
        if images_per_prompt != 1:
            raise UserError(
                f"suite {name} samples one image a prompt, not {images_per_prompt}: take more "
                "--num_prompts"
            )
        return SUITES[name]
    # A user's function has no name to compare with.
    if not reward.startswith("python:"):
        check_choice("suite", reward, tuple(dict.fromkeys((*SUITES, *REWARDS))))
    options = name[len(reward) :].strip(",")
    if reward in SUITES and options and (prompts_file is None or reward not in REWARDS):
        raise UserError(f"suite {reward} takes no options: leave out {options}")
    if reward in SUITES and reward not in REWARDS:
        raise UserError(f"suite {reward} has prompts of its own: leave out --prompts_file")
    if prompts_file is None:
        raise UserError(f"suite {name} scores the prompts of a file: name one (--prompts_file)")
    found = parsed(name)
    # Both are for the sum of several rewards in a run.
    if (found.weight, found.clip) != (1.0, None):
        raise UserError(f"suite {name} is one reward and no sum: leave out weight and clip")
    return RewardSuite(found, pathlib.Path(prompts_file), images_per_prompt)
