"""Compute the weighted sum of a run's rewards, with a check of every score.

    total = sum_r weight_r clip_r(score_r)

A failed reward is never a score: an image whose reward raises, or gives a number that is not
finite, or of a magnitude above LARGEST where no `clip` bounds it, has a reason in place of a total;
so have all images of a call that returns a different number of scores than images.

Shape suffixes: B images, H height, W width, C colour channels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import RewardConfig, check
from blip3o_jax.config.errors import type_and_line
from blip3o_jax.rl.rewards.registry import make
from blip3o_jax.rl.rewards.reward import Reward

# Scores are of order 1. One of this magnitude comes from a broken scorer, and would dominate the
# advantages of its group.
LARGEST = 1e6
REASON_LENGTH = 200  # characters of an exception that a reason keeps


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Hold `total_B` float32 [B], NaN where `reasons` (B of them) is not None. `parts`: float32 [B]
    by name, each reward's score before clipping under its name and its parts under "reward/part";
    NaN where there is none."""

    total_B: np.ndarray
    parts: dict[str, np.ndarray]
    reasons: list[str | None]


def failed(count: int, reason: str) -> Outcome:
    """Return the outcome of images that all failed for one reason."""
    return Outcome(np.full(count, np.nan, np.float32), {}, [reason] * count)


class WeightedRewards:
    """Make the rewards of `configs` and sum them. ConfigError or UserError where one cannot be
    made."""

    def __init__(self, configs: Sequence[RewardConfig]):
        check(len(configs) > 0, "rl.rewards is empty: name at least one reward")
        names = labels(configs)
        self._terms = [
            (name, config, make(config)) for name, config in zip(names, configs, strict=True)
        ]

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise the UserError of the first reward that cannot score this prompt."""
        for _, _, reward in self._terms:
            if hasattr(reward, "check"):
                reward.check(prompt, metadata)

    def __call__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Outcome:
        """Score uint8 images [B, H, W, 3] against their prompts; exceptions of a reward become
        reasons."""
        count = len(images_BHWC)
        total_B = np.zeros(count, np.float32)
        parts: dict[str, np.ndarray] = {}
        reasons: list[str | None] = [None] * count
        for name, config, reward in self._terms:
            try:
                scores_B, named = _scores(reward, images_BHWC, prompts, metadata)
            except (Exception, SystemExit) as e:
                # A failure of a scorer must not end the run.
                reasons = [f"{name}: {_described(e)}"] * count
                break
            parts |= {name: scores_B} | {
                f"{name}/{part}": values_B for part, values_B in named.items()
            }
            reasons = [
                old or _wrong(name, score, config)
                for old, score in zip(reasons, scores_B, strict=True)
            ]
            total_B += config.weight * (
                np.clip(scores_B, *config.clip) if config.clip else scores_B
            )
        total_B[[reason is not None for reason in reasons]] = np.nan
        return Outcome(total_B, parts, reasons)


def labels(configs: Sequence[RewardConfig]) -> list[str]:
    """Return a name for each reward in metrics: its own, or that of a user's function, numbered
    where it is taken.
    """
    names: list[str] = []
    for config in configs:
        name = config.name.rpartition(".")[2] if config.name.startswith("python:") else config.name
        same = sum(other.partition("#")[0] == name for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names


def _scores(
    reward: Reward,
    images_BHWC: np.ndarray,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return scores and parts, float32 [B] each. ValueError where one has another shape."""
    found = reward(images_BHWC, prompts, metadata)
    # Values beyond float32 become infinite, which `_wrong` refuses.
    with np.errstate(over="ignore"):
        arrays = {
            part: np.asarray(values, np.float32)
            for part, values in {"": found.total_B, **found.parts}.items()
        }
    for part, values in arrays.items():
        if values.shape != (len(images_BHWC),):
            what = f"part {part}" if part else "scores"
            raise ValueError(
                f"returned {what} of shape {list(values.shape)} for {len(images_BHWC)} images"
            )
    return arrays.pop(""), arrays


def _wrong(name: str, score: float, config: RewardConfig) -> str | None:
    """Return the reason why a score is invalid, or None."""
    if not np.isfinite(score):
        return f"{name}: its score is {score}"
    if config.clip is None and abs(score) > LARGEST:
        return f"{name}: its score is beyond {LARGEST:g}; set clip if that is meant"
    return None


def _described(error: BaseException) -> str:
    """Return the type and message of an exception in one short line."""
    text = type_and_line(error)
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."
