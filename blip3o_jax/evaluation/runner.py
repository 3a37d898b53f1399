"""Has a checkpoint do what a suite asks, judges the images or answers, writes scores.json and the
pictures.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import UserError, check_choice
from blip3o_jax.evaluation import shapes
from blip3o_jax.evaluation.images_in import Reconstruct, ShapesEdit, ShapesQa
from blip3o_jax.evaluation.judged import Judged, Prompt
from blip3o_jax.evaluation.rewarded import Rewarded
from blip3o_jax.files import write_json
from blip3o_jax.pipeline import Request
from blip3o_jax.rl.rewards.registry import REWARDS, parsed
from blip3o_jax.samples import check_images_out, write_images

ANSWER = 16  # tokens that an answer of the embedded data set may have


class Suite(Protocol):
    """Prompts, what they ask of a model, and a judge of its answers in their order: uint8 images
    [B, H, W, 3], or texts.
    """

    def prompts(self, count: int | None, seed: int) -> list[Prompt]:
        """`count` of them; None: as many as the suite has or commonly takes."""
        ...

    def requests(self, asked: Sequence[Prompt], image_size: int) -> list[Request]:
        """Scenes of the embedded data set are square, of this side, whatever shapes the model has."""
        ...

    def judge(self, answers: Any, asked: Sequence[Prompt]) -> Judged: ...

    def baselines(self, answers: Any, asked: Sequence[Prompt], seed: int) -> dict[str, Judged]:
        """Verdicts on other answers to the same prompts, by which the model's are to be read."""
        ...


SUITES = {
    "shapes": shapes,
    "shapes_edit": ShapesEdit(),
    "shapes_qa": ShapesQa(),
    "reconstruct": Reconstruct(),
}


def find_suite(
    name: str, prompts_file: str | pathlib.Path | None = None, images_per_prompt: int = 1
) -> Suite:
    """One of SUITES, which has prompts of its own, or a reward with its options,
    "ocr,scoring=reference", for those of a file.
    """
    reward = name.partition(",")[0]
    if name in SUITES and prompts_file is None:
        if images_per_prompt != 1:
            raise UserError(
                f"suite {name} draws one image a prompt, not {images_per_prompt}: take more --num_prompts"
            )
        return SUITES[name]
    if not reward.startswith("python:"):
        check_choice("suite", reward, tuple(dict.fromkeys((*SUITES, *REWARDS))))
    if prompts_file is None:
        raise UserError(f"suite {name} judges the prompts of a file: name one (--prompts_file)")
    found = parsed(name)
    if (found.weight, found.clip) != (1.0, None):
        raise UserError(f"suite {name} is one reward and no sum: leave out weight and clip")
    return Rewarded(found, pathlib.Path(prompts_file), images_per_prompt)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The model's verdicts beside those on other answers, and what they were read from: pictures
    and codes, or texts.
    """

    prompts: list[Prompt]
    requests: list[Request]
    images: np.ndarray | None
    codes: np.ndarray | None
    said: list[str] | None
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
    """Evaluates a checkpoint on `suite` and writes scores.json, verdicts.json and the images under
    `out`.
    """
    bench = find_suite(suite, prompts_file, images_per_prompt)
    check_images_out(pathlib.Path(out) / "images")
    pipeline = pipelines.load(checkpoint)
    result = evaluate_pipeline(pipeline, bench, num_prompts=num_prompts, seed=seed, **sampling)
    write(result, pathlib.Path(out))
    scores = result.scores()
    print(
        "  ".join(f"{name} {share:.3f}" for name, share in scores["categories"].items()),
        file=sys.stderr,
    )
    print(
        f"{suite}: {scores['overall']:.3f} of {len(result.prompts)} held-out prompts, {out}/scores.json",
        file=sys.stderr,
    )
    return result


def evaluate_pipeline(
    pipeline: pipelines.Pipeline,
    suite: Suite = shapes,
    *,
    num_prompts: int | None,
    seed: int = 0,
    **sampling: Any,
) -> Evaluation:
    """As `evaluate`, for a pipeline already in memory; writes nothing. `sampling` are fields of
    SamplingConfig.
    """
    asked = suite.prompts(num_prompts, seed)
    requests, images, codes, said = (
        suite.requests(asked, pipeline.config.model.image_size),
        None,
        None,
        None,
    )
    if requests[0].task == "understand":
        shown, texts = (
            [request.images for request in requests],
            [request.text for request in requests],
        )
        said = pipeline.ask(shown, texts, max_new_tokens=ANSWER, seed=seed, **sampling)
    else:
        drawn = pipeline.generate_requests(requests, seed=seed, progress=True, **sampling)
        images, codes = drawn.images, drawn.codes
    answers = images if said is None else said
    ours, others = suite.judge(answers, asked), suite.baselines(answers, asked, seed)
    return Evaluation(asked, requests, images, codes, said, ours, others)


def write(result: Evaluation, out: pathlib.Path) -> None:
    """scores.json, verdicts.json (one entry a prompt) and images/: what was drawn, what was shown
    beside it.

    Those of an earlier evaluation go first, so that scores.json, which comes last, is of what lies
    beside it.
    """
    for name in ("scores.json", "verdicts.json"):
        (out / name).unlink(missing_ok=True)
    captions = [p["caption"] for p in result.prompts]
    shown = [request.images[0] for request in result.requests if request.images]
    if result.said is not None:
        write_images(
            np.stack(shown),
            [f"{q} {a}" for q, a in zip(captions, result.said, strict=True)],
            out / "images",
        )
    elif shown:
        pairs = [np.concatenate(pair, axis=1) for pair in zip(shown, result.images, strict=True)]
        write_images(np.stack(pairs), captions, out / "images")
    else:
        write_images(result.images, captions, out / "images")
    verdicts = zip(result.prompts, result.ours.correct, result.ours.reasons, strict=True)
    write_json(
        out / "verdicts.json",
        [
            {"caption": p["caption"], "category": p["category"], "correct": c, "reason": r}
            for p, c, r in verdicts
        ],
    )
    write_json(out / "scores.json", result.scores())
