"""Samples a suite's prompts from a checkpoint, judges the images, writes scores.json and the pictures."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import UserError, check_choice
from blip3o_jax.evaluation import shapes
from blip3o_jax.evaluation.judged import Judged, Prompt
from blip3o_jax.evaluation.rewarded import Rewarded
from blip3o_jax.rl.rewards.registry import REWARDS, parsed
from blip3o_jax.samples import write_images
from blip3o_jax.train.checkpoint import write_json


class Suite(Protocol):
    """Prompts, and a judge of uint8 images [B, H, W, 3] that are in their order."""

    def prompts(self, count: int | None, seed: int) -> list[Prompt]:
        """`count` of them; None: as many as the suite has or commonly takes."""
        ...

    def judge(self, images_BHWC: np.ndarray, asked: Sequence[Prompt]) -> Judged: ...

    def baselines(self, images_BHWC: np.ndarray, asked: Sequence[Prompt], seed: int) -> dict[str, Judged]:
        """Verdicts on other images for the same prompts, by which the model's are to be read."""
        ...


def find_suite(name: str, prompts_file: str | pathlib.Path | None = None, images_per_prompt: int = 1) -> Suite:
    """ "shapes", which has prompts of its own, or a reward with its options, "ocr,scoring=reference", for those of a file."""
    reward = name.partition(",")[0]
    if name == "shapes" and prompts_file is None:
        if images_per_prompt != 1:
            raise UserError(f"suite shapes draws one image a prompt, not {images_per_prompt}: take more --num_prompts")
        return shapes
    if not reward.startswith("python:"):
        check_choice("suite", reward, tuple(dict.fromkeys(("shapes", *REWARDS))))
    if prompts_file is None:
        raise UserError(f"suite {name} judges the prompts of a file: name one (--prompts_file)")
    return Rewarded(parsed(name), pathlib.Path(prompts_file), images_per_prompt)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The model's verdicts beside those on other images, and the pictures and codes they were read from."""

    prompts: list[Prompt]
    images: np.ndarray
    codes: np.ndarray
    ours: Judged
    baselines: dict[str, Judged]

    def scores(self) -> dict[str, Any]:
        """What scores.json holds."""
        baselines = {name: judged.shares() for name, judged in self.baselines.items()}
        return self.ours.shares() | {"prompts": len(self.prompts), "baselines": baselines}


def evaluate(
    checkpoint: str | pathlib.Path,
    suite: str,
    out: str | pathlib.Path,
    *,
    num_prompts: int | None,
    seed: int,
    prompts_file: str | pathlib.Path | None = None,
    images_per_prompt: int = 1,
    **sampling: Any,
) -> Evaluation:
    """Evaluates a checkpoint on `suite` and writes scores.json, verdicts.json and the images under `out`."""
    bench = find_suite(suite, prompts_file, images_per_prompt)
    pipeline = pipelines.load(checkpoint)
    result = evaluate_pipeline(pipeline, bench, num_prompts=num_prompts, seed=seed, **sampling)
    write(result, pathlib.Path(out))
    scores = result.scores()
    print("  ".join(f"{name} {share:.3f}" for name, share in scores["categories"].items()), file=sys.stderr)
    print(f"{suite}: {scores['overall']:.3f} of {len(result.prompts)} held-out prompts, {out}/scores.json", file=sys.stderr)
    return result


def evaluate_pipeline(
    pipeline: pipelines.Pipeline, suite: Suite = shapes, *, num_prompts: int | None, seed: int = 0, **sampling: Any
) -> Evaluation:
    """As `evaluate`, for a pipeline already in memory; writes nothing. `sampling` are fields of SamplingConfig."""
    asked = suite.prompts(num_prompts, seed)
    drawn = pipeline.generate([p["caption"] for p in asked], seed=seed, progress=True, **sampling)
    ours, others = suite.judge(drawn.images, asked), suite.baselines(drawn.images, asked, seed)
    return Evaluation(asked, drawn.images, drawn.codes, ours, others)


def write(result: Evaluation, out: pathlib.Path) -> None:
    """scores.json, verdicts.json (one entry a prompt) and images/."""
    write_images(result.images, [p["caption"] for p in result.prompts], out / "images")
    write_json(out / "scores.json", result.scores())
    verdicts = zip(result.prompts, result.ours.correct, result.ours.reasons, strict=True)
    write_json(
        out / "verdicts.json",
        [{"caption": p["caption"], "category": p["category"], "correct": c, "reason": r} for p, c, r in verdicts],
    )
