"""What a suite says of images, in shares of right ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Prompt = dict[str, Any]  # {"caption", "category", ...}


@dataclasses.dataclass(frozen=True)
class Judged:
    """Shares of right images per category and over all (the mean of the categories, as GenEval has
    it), and for each image whether it is right and why (not). `means`: of what the suite measures
    beside right and wrong, by name.
    """

    overall: float
    categories: dict[str, float]
    correct: list[bool]
    reasons: list[str]
    means: dict[str, float] = dataclasses.field(default_factory=dict)

    def shares(self) -> dict[str, Any]:
        """As scores.json has them."""
        return {"overall": self.overall, "categories": self.categories} | self.means


def tally(
    correct: Sequence[bool],
    reasons: Sequence[str],
    asked: Sequence[Prompt],
    **measured: Sequence[float],
) -> Judged:
    """The verdicts of single images, gathered by the category of their prompts; `measured` has a
    number for each by name.
    """
    of: dict[str, list[bool]] = {}
    for prompt, right in zip(asked, correct, strict=True):
        of.setdefault(prompt["category"], []).append(right)
    categories = {name: float(np.mean(rights)) for name, rights in of.items()}
    means = {name: float(np.mean(values)) for name, values in measured.items()}
    return Judged(
        float(np.mean(list(categories.values()))), categories, list(correct), list(reasons), means
    )
