"""Evaluate a checkpoint on a suite: sample images or answers, score them, write scores.json and the
images.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np

from blip3o_jax import pipeline as pipelines
from blip3o_jax.evaluation import shapes
from blip3o_jax.evaluation.registry import Suite, find_suite
from blip3o_jax.evaluation.result import SuitePrompt, SuiteResult
from blip3o_jax.files import write_json
from blip3o_jax.pipeline import Request
from blip3o_jax.samples import check_images_out, write_images

MAX_ANSWER_TOKENS = 16  # of an answer of the embedded data set


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Hold the results of the model and of the baselines, with the outputs that were scored: images
    and codes, or answers."""

    prompts: list[SuitePrompt]
    requests: list[Request]
    images: np.ndarray | list[np.ndarray] | None
    codes: np.ndarray | None
    answers: list[str] | None
    result: SuiteResult
    baselines: dict[str, SuiteResult]

    def scores(self) -> dict[str, Any]:
        """Return the contents of scores.json."""
        baselines = {name: result.scores() for name, result in self.baselines.items()}
        return self.result.scores() | {"prompts": len(self.prompts), "baselines": baselines}


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
    """Evaluate a checkpoint on `suite` and write scores.json, results.json and the images under
    `out`.
    """
    bench = find_suite(suite, prompts_file, images_per_prompt)
    # Before the checkpoint is loaded and sampled from, which takes minutes to hours.
    check_images_out(pathlib.Path(out) / "images")
    pipeline = pipelines.load(checkpoint)
    evaluation = evaluate_pipeline(pipeline, bench, num_prompts=num_prompts, seed=seed, **sampling)
    write(evaluation, pathlib.Path(out))
    scores = evaluation.scores()
    print(
        "  ".join(f"{name} {fraction:.3f}" for name, fraction in scores["categories"].items()),
        file=sys.stderr,
    )
    print(
        f"{suite}: {scores['overall']:.3f} of {len(evaluation.prompts)} held-out prompts, "
        f"{out}/scores.json",
        file=sys.stderr,
    )
    return evaluation


def evaluate_pipeline(
    pipeline: pipelines.Pipeline,
    suite: Suite = shapes,
    *,
    num_prompts: int | None,
    seed: int = 0,
    **sampling: Any,
) -> Evaluation:
    """Evaluate a pipeline that is in memory, without writing files. `sampling` are fields of
    SamplingConfig.
    """
    prompts = suite.prompts(num_prompts, seed)
    requests = suite.requests(prompts, pipeline.config.model.image_size)
    images = None
    codes = None
    answers = None
    # The requests of a suite have one task: its outputs are all images or all answers.
    if requests[0].task == "understand":
        references = [request.images for request in requests]
        texts = [request.text for request in requests]
        answers = pipeline.ask(
            references,
            texts,
            max_new_tokens=MAX_ANSWER_TOKENS,
            seed=seed,
            progress=True,
            **sampling,
        )
    else:
        generated = pipeline.generate_requests(requests, seed=seed, progress=True, **sampling)
        images, codes = generated.images, generated.codes
    outputs = images if answers is None else answers
    result, others = suite.score_outputs(outputs, prompts), suite.baselines(outputs, prompts, seed)
    return Evaluation(prompts, requests, images, codes, answers, result, others)


def write(evaluation: Evaluation, out: pathlib.Path) -> None:
    """Write scores.json, results.json (one entry a prompt) and images/: the outputs next to
    their reference images.

    Files of an earlier evaluation are removed first, so that scores.json, which is written last,
    belongs to the other files.
    """
    for name in ("scores.json", "results.json"):
        (out / name).unlink(missing_ok=True)
    captions = [p["caption"] for p in evaluation.prompts]
    references = [request.images[0] for request in evaluation.requests if request.images]
    if evaluation.answers is not None:
        write_images(
            references,
            [f"{q} {a}" for q, a in zip(captions, evaluation.answers, strict=True)],
            out / "images",
        )
    elif evaluation.images is not None:
        images = list(evaluation.images)
        if references:
            images = [np.concatenate(pair, axis=1) for pair in zip(references, images, strict=True)]
        write_images(images, captions, out / "images")
    outcomes = zip(
        evaluation.prompts, evaluation.result.correct, evaluation.result.reasons, strict=True
    )
    write_json(
        out / "results.json",
        [
            {"caption": p["caption"], "category": p["category"], "correct": c, "reason": r}
            for p, c, r in outcomes
        ],
    )
    write_json(out / "scores.json", evaluation.scores())
