"""Hold the result of a suite: the correctness of single outputs, and fractions of correct ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

SuitePrompt = dict[str, Any]  # {"caption", "category", ...}


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """Hold the fractions of correct outputs per category and overall (the mean of the categories,
    as in GenEval), and the correctness of each output with its reason. `means`: mean values of the
    suite's further measures, by name."""

    overall: float
    categories: dict[str, float]
    correct: list[bool]
    reasons: list[str]
    means: dict[str, float] = dataclasses.field(default_factory=dict)

    def scores(self) -> dict[str, Any]:
        """Return the entries of scores.json."""
        return {"overall": self.overall, "categories": self.categories} | self.means


def tally(
    correct: Sequence[bool],
    reasons: Sequence[str],
    prompts: Sequence[SuitePrompt],
    **measured: Sequence[float] | np.ndarray,
) -> SuiteResult:
    """Aggregate the correctness of single outputs by the category of their prompts; `measured`
    holds one value an output by name.
    """
    of: dict[str, list[bool]] = {}
    for prompt, right in zip(prompts, correct, strict=True):
        of.setdefault(prompt["category"], []).append(right)
    categories = {name: float(np.mean(rights)) for name, rights in of.items()}
    means = {name: float(np.mean(values)) for name, values in measured.items()}
    return SuiteResult(
        float(np.mean(list(categories.values()))), categories, list(correct), list(reasons), means
    )
