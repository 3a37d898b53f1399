"""What a suite says of images, in shares of right ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Prompt = dict[str, Any]  # {"caption", "category", ...}


@dataclasses.dataclass(frozen=True)
class Judged:
    """Shares of right images per category and over all (the mean of the categories, as GenEval has it), and for each image
    whether it is right and why (not). `score`: mean of the suite's own score, where it has one beside right and wrong."""

    overall: float
    categories: dict[str, float]
    correct: list[bool]
    reasons: list[str]
    score: float | None = None

    def shares(self) -> dict[str, Any]:
        """As scores.json has them."""
        return {"overall": self.overall, "categories": self.categories} | ({} if self.score is None else {"score": self.score})


def tally(correct: Sequence[bool], reasons: Sequence[str], asked: Sequence[Prompt], scores: np.ndarray | None = None) -> Judged:
    """The verdicts of single images, gathered by the category of their prompts."""
    of: dict[str, list[bool]] = {}
    for prompt, right in zip(asked, correct, strict=True):
        of.setdefault(prompt["category"], []).append(right)
    categories = {name: float(np.mean(rights)) for name, rights in of.items()}
    score = None if scores is None else float(np.mean(scores))
    return Judged(float(np.mean(list(categories.values()))), categories, list(correct), list(reasons), score)
