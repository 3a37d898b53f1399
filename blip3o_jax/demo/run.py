"""Run `blip3o demo`: prepare the data, train the recipe, sample held-out prompts, score them and
write the report.
"""

import collections
import contextlib
import itertools
import pathlib
import sys
from typing import Any

import numpy as np

from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import Config
from blip3o_jax.data.shapes import builder, tasks
from blip3o_jax.demo import chain
from blip3o_jax.demo.recipe import IMAGE_SIZE, recipe, reinforcement
from blip3o_jax.evaluation import registry, report, runner, shapes
from blip3o_jax.evaluation import report_contents as contents
from blip3o_jax.rl import trainer

# Suite with reference images -> (baseline, its name in the report, note of the report).
IMAGE_TASKS = {
    "shapes_edit": (
        "input_unchanged",
        "input unchanged",
        "Right where the edit was done and all else is as it was, to 22 dB.",
    ),
    "shapes_qa": (
        "most_frequent_answer",
        "most frequent answer",
        "Right where the answer is the same words.",
    ),
    "reconstruct": (
        "images_of_other_prompts",
        "another scene",
        (
            "Reconstructed from its nine tokens; right where the scorer finds what the scene's"
            " caption asks for."
        ),
    ),
}
EXAMPLES = 28  # of each suite with reference images


def run(workdir: str | pathlib.Path, *, fast: bool = False) -> dict[str, Any]:
    """Run or resume the demo under `workdir`; return {"shapes_overall", "seconds", ...}."""
    with chain.quick_compile() if fast else contextlib.nullcontext():
        return _run(pathlib.Path(workdir).absolute(), fast)


def _run(workdir: pathlib.Path, fast: bool) -> dict[str, Any]:
    clock = chain.Clock(workdir, fast=fast)
    num_prompts = 28 if fast else 350
    with clock("data"):
        data_dir = builder.prepare(
            workdir / "data",
            num_train=500 if fast else 12_000,
            num_validation=64,
            num_test=num_prompts,
            image_size=IMAGE_SIZE,
            seed=0,
        )
        counts = (
            {"num_edits": 70, "num_questions": 40}
            if fast
            else {"num_edits": 8_000, "num_questions": 12_000}
        )
        files = tasks.prepare(data_dir, **counts, image_size=IMAGE_SIZE)
    stages = recipe(str(data_dir), str(workdir / "cache"), files, fast=fast)
    chain.train(stages, workdir, clock)
    before = _evaluate(workdir, "train", num_prompts, clock)
    stages["rl"] = reinforcement(
        workdir / "train", str(data_dir / builder.PROMPTS.format(split="train")), fast=fast
    )
    clock.trained("rl", trainer.run(stages["rl"], workdir / "rl"))
    after = _evaluate(workdir, "rl", num_prompts, clock)
    with clock("edit, answer and score"):
        image_tasks = _evaluate_image_tasks(workdir, num_prompts)
    with clock("report"):
        path = workdir / "report.html"
        results = _results(workdir, before, after, image_tasks, stages, clock, fast)
        report.write_report(results, path)
    seconds = sum(clock.seconds.values())
    scores = after.scores()
    print(f"report: {path}", file=sys.stderr)
    return {
        "shapes_overall": round(scores["overall"], 4),
        "before_rl": round(before.scores()["overall"], 4),
        **{name: round(evaluation.result.overall, 4) for name, evaluation in image_tasks.items()},
        "seconds": round(seconds, 1),
        "report": str(path),
        "fast": fast,
        "prompts": num_prompts,
        "categories": {name: round(share, 4) for name, share in scores["categories"].items()},
        "real_images": round(after.baselines["real_images"].overall, 4),
        "random_images": round(after.baselines["random_images"].overall, 4),
        "peak_memory_gib": round(clock.peak_memory(), 2),
    }


def _evaluate(
    workdir: pathlib.Path, name: str, num_prompts: int, clock: chain.Clock
) -> runner.Evaluation:
    """Evaluate the model in `workdir`/`name` and write the result under
    `workdir`/evaluation/`name`.
    """
    with clock(f"sample and score {name}"):
        evaluation = runner.evaluate_pipeline(
            pipelines.load(workdir / name), num_prompts=num_prompts
        )
        runner.write(evaluation, workdir / "evaluation" / name)
    return evaluation


def _evaluate_image_tasks(workdir: pathlib.Path, num_prompts: int) -> dict[str, runner.Evaluation]:
    """Evaluate the joint stage's model on the suites with reference images; write the results."""
    pipeline = pipelines.load(workdir / "train")
    found = {}
    for name in IMAGE_TASKS:
        found[name] = runner.evaluate_pipeline(
            pipeline, registry.find_suite(name), num_prompts=num_prompts
        )
        runner.write(found[name], workdir / "evaluation" / name)
    return found


def _results(
    workdir: pathlib.Path,
    before: runner.Evaluation,
    after: runner.Evaluation,
    image_tasks: dict[str, runner.Evaluation],
    stages: dict[str, Config],
    clock: chain.Clock,
    fast: bool,
) -> contents.Results:
    assert after.images is not None and after.codes is not None
    pipeline = pipelines.load(workdir / "rl")
    captions = [prompt["caption"] for prompt in after.prompts]
    originals = shapes.real_images(chain.SHOWN, IMAGE_SIZE)
    overall, categories = _scores(after)
    of_run = chain.facts_of_run(workdir, stages, pipeline.config, clock)
    of_run["facts"] |= chain.FAST_FACT if fast else {}
    return contents.Results(
        title="BLIP3o-NEXT in JAX: the demo",
        subtitle=(
            "Every part trained from random weights on drawn scenes, then asked for combinations it"
            " has never seen."
        ),
        scored=contents.Scored(
            overall,
            categories,
            _samples(after),
            contents.Before(*_scores(before), _samples(before)),
        ),
        image_tasks=[_image_task(name, evaluation) for name, evaluation in image_tasks.items()],
        **chain.inner_workings(
            pipeline, originals, captions, (np.asarray(after.images), after.codes, captions)
        ),
        **of_run,
    )


def _scores(evaluation: runner.Evaluation) -> tuple[contents.Score, list[contents.Score]]:
    """Return the overall score and that of each category."""
    model, real, random = (
        evaluation.result,
        *(evaluation.baselines[name] for name in ("real_images", "random_images")),
    )
    counts = collections.Counter(p["category"] for p in evaluation.prompts)
    return contents.Score(
        "overall", len(evaluation.prompts), model.overall, random.overall, real.overall
    ), [
        contents.Score(n, counts[n], model.categories[n], random.categories[n], real.categories[n])
        for n in model.categories
    ]


def _samples(evaluation: runner.Evaluation) -> list[contents.Sample]:
    assert evaluation.images is not None
    rows = zip(
        evaluation.prompts,
        evaluation.images,
        evaluation.result.correct,
        evaluation.result.reasons,
        strict=True,
    )
    return [
        contents.Sample(p["caption"], p["category"], image, correct, reason)
        for p, image, correct, reason in rows
    ]


def _image_task(name: str, evaluation: runner.Evaluation) -> contents.ImageTask:
    baseline, words, note = IMAGE_TASKS[name]
    model = evaluation.result
    other = evaluation.baselines[baseline]
    counts = collections.Counter(p["category"] for p in evaluation.prompts)
    scores = [
        (category, counts[category], share, other.categories[category])
        for category, share in model.categories.items()
    ]
    outputs = itertools.repeat(None) if evaluation.images is None else evaluation.images
    rows = zip(
        evaluation.requests,
        outputs,
        evaluation.answers or itertools.repeat(""),
        model.correct,
        model.reasons,
        strict=False,
    )
    return contents.ImageTask(
        name,
        note,
        words,
        [*scores, ("overall", len(evaluation.prompts), model.overall, other.overall)],
        [
            contents.ImageTaskExample(request.images[0], request.text, *row)
            for request, *row in itertools.islice(rows, EXAMPLES)
        ],
    )
