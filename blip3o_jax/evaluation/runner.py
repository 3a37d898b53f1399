"""Samples a suite's prompts from a checkpoint, judges the images, writes scores.json and the pictures."""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np

from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import check_choice
from blip3o_jax.evaluation import shapes
from blip3o_jax.samples import write_images
from blip3o_jax.train.checkpoint import write_json

SUITES = {"shapes": shapes}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The model's verdicts beside those of real and of unrelated images, and the pictures and codes they were read from."""

    prompts: list[dict[str, Any]]
    images: np.ndarray
    codes: np.ndarray
    ours: shapes.Judged
    real: shapes.Judged
    random: shapes.Judged

    def scores(self) -> dict[str, Any]:
        """What scores.json holds."""
        named = {"ours": self.ours, "real_images": self.real, "random_images": self.random}
        return {
            "overall": self.ours.overall,
            "categories": self.ours.categories,
            "prompts": len(self.prompts),
            "baselines": {
                name: {"overall": judged.overall, "categories": judged.categories}
                for name, judged in named.items()
                if name != "ours"
            },
        }


def evaluate(
    checkpoint: str | pathlib.Path, suite: str, out: str | pathlib.Path, *, num_prompts: int, seed: int, **sampling: Any
) -> Evaluation:
    """Evaluates a checkpoint on `suite` and writes scores.json, verdicts.json and the images under `out`."""
    check_choice("suite", suite, SUITES)
    pipeline = pipelines.load(checkpoint)
    result = evaluate_pipeline(pipeline, suite, num_prompts=num_prompts, seed=seed, **sampling)
    write(result, pathlib.Path(out))
    scores = result.scores()
    print("  ".join(f"{name} {share:.3f}" for name, share in scores["categories"].items()), file=sys.stderr)
    print(f"{suite}: {scores['overall']:.3f} of {num_prompts} held-out prompts, {out}/scores.json", file=sys.stderr)
    return result


def evaluate_pipeline(
    pipeline: pipelines.Pipeline, suite: str, *, num_prompts: int, seed: int = 0, **sampling: Any
) -> Evaluation:
    """As `evaluate`, for a pipeline already in memory; writes nothing. `sampling` are fields of SamplingConfig."""
    bench = SUITES[suite]
    size = pipeline.config.model.image_size
    prompts = bench.prompts(num_prompts, seed)
    generated = pipeline.generate([p["caption"] for p in prompts], seed=seed, progress=True, **sampling)
    return Evaluation(
        prompts,
        generated.images,
        generated.codes,
        ours=bench.judge(generated.images, prompts),
        real=bench.judge(bench.real_images(num_prompts, size, seed), prompts),
        random=bench.judge(bench.random_images(num_prompts, size, seed), prompts),
    )


def write(result: Evaluation, out: pathlib.Path) -> None:
    """scores.json, verdicts.json (one entry a prompt) and images/."""
    write_images(result.images, [p["caption"] for p in result.prompts], out / "images")
    write_json(out / "scores.json", result.scores())
    verdicts = zip(result.prompts, result.ours.correct, result.ours.reasons, strict=True)
    write_json(
        out / "verdicts.json",
        [{"caption": p["caption"], "category": p["category"], "correct": c, "reason": r} for p, c, r in verdicts],
    )
