"""Define the `shapes_qa` suite: questions about held-out scenes of the embedded data set, correct
where the answer has the same words (data/shapes/questions.py).

Baseline: the most frequent answer of a question's category.
"""

import collections
from collections.abc import Sequence

from blip3o_jax.data.shapes import questions, render
from blip3o_jax.evaluation.result import SuitePrompt, SuiteResult, tally
from blip3o_jax.evaluation.shapes import COUNT, key_arguments
from blip3o_jax.pipeline import Request


class ShapesQa:
    """Evaluate answers to questions about held-out scenes."""

    def prompts(self, count: int | None, seed: int = 0) -> list[SuitePrompt]:
        return questions.prompts("test", count or COUNT, seed)

    def requests(self, prompts: Sequence[SuitePrompt], image_size: int) -> list[Request]:
        return [
            Request(
                "understand",
                p["caption"],
                (render(questions.sample_question(*key_arguments(p["key"])).scene, image_size),),
            )
            for p in prompts
        ]

    def score_outputs(self, answers: Sequence[str], prompts: Sequence[SuitePrompt]) -> SuiteResult:
        right = [
            questions.right(words, p["answer"]) for words, p in zip(answers, prompts, strict=True)
        ]
        return tally(
            right,
            [
                f"{words!r}, asked {p['answer']!r}"
                for words, p in zip(answers, prompts, strict=True)
            ],
            prompts,
        )

    def baselines(
        self, answers: Sequence[str], prompts: Sequence[SuitePrompt], seed: int = 0
    ) -> dict[str, SuiteResult]:
        """Score the most frequent answer of each category of these questions: the best constant
        answer.
        """
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for p in prompts:
            counts[p["category"]][p["answer"]] += 1
        return {
            "most_frequent_answer": self.score_outputs(
                [counts[p["category"]].most_common(1)[0][0] for p in prompts], prompts
            )
        }
