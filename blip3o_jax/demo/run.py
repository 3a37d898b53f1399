"""Run `blip3o demo`: prepare the data, train the recipe, sample held-out prompts, score them and
write the report.
"""

import collections
import contextlib
import importlib.metadata
import itertools
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import blip3o_jax
from blip3o_jax import config as config_lib
from blip3o_jax import model_table
from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import Config
from blip3o_jax.data import images
from blip3o_jax.data.shapes import builder, tasks
from blip3o_jax.demo.recipe import IMAGE_SIZE, recipe, reinforcement
from blip3o_jax.evaluation import report, runner, shapes
from blip3o_jax.rl import method
from blip3o_jax.train import recipe as recipes
from blip3o_jax.train.metrics import read_rows

CURVES = {
    "autoencoder": ("train/loss", "train/psnr"),
    "contrastive": ("train/loss", "train/image_to_text"),
    "tokenizer": ("train/reconstruction", "train/usage", "train/perplexity"),
    "joint": ("train/ce", "train/flow", "train/accuracy", "train/grad_norm"),
    "rl": ("rl/rewards/shapes/correct/mean", "rl/reward", "rl/kl", "rl/entropy"),
}
NOTES = {
    "autoencoder": "DC-AE: pixels to latents and back; L1 and image gradients.",
    "contrastive": "SigLIP: the vision encoder learns which caption belongs to which image.",
    "tokenizer": "TA-Tok: the frozen encoder's features through a SimVQ codebook and back.",
    "joint": (
        "Cross entropy of the image tokens and flow matching of the latents, trained together."
    ),
    "rl": (
        "GRPO on the image tokens: the fraction of right images in each rollout is "
        "rl/rewards/shapes/correct/mean."
    ),
}
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
    with _quick_compile() if fast else contextlib.nullcontext():
        return _run(pathlib.Path(workdir).absolute(), fast)


def _run(workdir: pathlib.Path, fast: bool) -> dict[str, Any]:
    clock = _Clock()
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
    summaries = recipes.run(stages, workdir / "train")
    clock.seconds |= {name: summary.seconds for name, summary in summaries.items()}
    before = _evaluate(workdir, "train", num_prompts, clock)
    stages["rl"] = reinforcement(
        workdir / "train", str(data_dir / builder.PROMPTS.format(split="train")), fast=fast
    )
    clock.seconds["rl"] = method.run(stages["rl"], workdir / "rl").seconds
    after = _evaluate(workdir, "rl", num_prompts, clock)
    with clock("edit, answer and score"):
        image_tasks = _evaluate_image_tasks(workdir, num_prompts)
    with clock("report"):
        path = workdir / "report.html"
        report.write_report(_results(workdir, before, after, image_tasks, stages, clock), path)
    seconds = sum(clock.seconds.values())
    scores = after.scores()
    print(f"report: {path}", file=sys.stderr)
    return {
        "shapes_overall": round(scores["overall"], 4),
        "before_rl": round(before.scores()["overall"], 4),
        **{name: round(evaluation.result.overall, 4) for name, evaluation in image_tasks.items()},
        "seconds": round(seconds, 1),
        "report": str(path),
        "prompts": num_prompts,
        "categories": {name: round(share, 4) for name, share in scores["categories"].items()},
        "real_images": round(after.baselines["real_images"].overall, 4),
        "random_images": round(after.baselines["random_images"].overall, 4),
        "peak_memory_gib": round(_peak_memory(), 2),
    }


@contextlib.contextmanager
def _quick_compile() -> Iterator[None]:
    """Compile without most optimizations: programs that run for a few steps spend most time in the
    compiler.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


class _Clock:
    """Measure the seconds of named parts, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"--- {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def _peak_memory() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _evaluate(
    workdir: pathlib.Path, name: str, num_prompts: int, clock: _Clock
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
            pipeline, runner.find_suite(name), num_prompts=num_prompts
        )
        runner.write(found[name], workdir / "evaluation" / name)
    return found


def _results(
    workdir: pathlib.Path,
    before: runner.Evaluation,
    after: runner.Evaluation,
    image_tasks: dict[str, runner.Evaluation],
    stages: dict[str, Config],
    clock: _Clock,
) -> report.Results:
    assert after.images is not None and after.codes is not None
    pipeline = pipelines.load(workdir / "rl")
    originals = shapes.real_images(8, IMAGE_SIZE)
    tokenizer_size = pipeline.config.model.tokenizer.image_size
    codes = pipeline.codes(np.stack([images.crop_and_resize(x, tokenizer_size) for x in originals]))
    grid = pipeline.config.model.tokenizer.grid
    parameters = sum(
        row["parameters"] for row in model_table.count_parameters(pipeline.config).values()
    )
    overall, categories = _scores(after)
    return report.Results(
        title="BLIP3o-NEXT in JAX: the demo",
        subtitle=(
            "Every part trained from random weights on drawn scenes, then asked for combinations it"
            " has never seen."
        ),
        overall=overall,
        categories=categories,
        samples=_samples(after),
        before=report.Before(*_scores(before), _samples(before)),
        image_tasks=[_image_task(name, evaluation) for name, evaluation in image_tasks.items()],
        stages=[
            report.Stage(name, _curves(_directory(workdir, name), CURVES[name]), NOTES[name])
            for name in stages
        ],
        reconstructions=[
            report.Reconstruction(*pair)
            for pair in zip(originals, pipeline.autoencode(originals), strict=True)
        ],
        token_maps=[
            report.TokenMap(image, ids.reshape(grid, grid), prompt["caption"])
            for image, ids, prompt in zip(originals, codes, after.prompts, strict=False)
        ]
        + [
            report.TokenMap(image, ids.reshape(grid, grid), "sampled: " + prompt["caption"])
            for image, ids, prompt in zip(
                after.images[:8], after.codes, after.prompts, strict=False
            )
        ],
        seconds=clock.seconds,
        facts={
            "parameters": f"{parameters / 1e6:.1f} M",
            "peak memory": f"{_peak_memory():.1f} GiB",
        },
        configuration={name: config_lib.to_dict(stage) for name, stage in stages.items()},
        versions=_versions(),
    )


def _scores(evaluation: runner.Evaluation) -> tuple[report.Score, list[report.Score]]:
    """Return the overall score and that of each category."""
    model, real, random = (
        evaluation.result,
        *(evaluation.baselines[name] for name in ("real_images", "random_images")),
    )
    counts = collections.Counter(p["category"] for p in evaluation.prompts)
    return report.Score(
        "overall", len(evaluation.prompts), model.overall, random.overall, real.overall
    ), [
        report.Score(n, counts[n], model.categories[n], random.categories[n], real.categories[n])
        for n in model.categories
    ]


def _samples(evaluation: runner.Evaluation) -> list[report.Sample]:
    assert evaluation.images is not None
    rows = zip(
        evaluation.prompts,
        evaluation.images,
        evaluation.result.correct,
        evaluation.result.reasons,
        strict=True,
    )
    return [
        report.Sample(p["caption"], p["category"], image, correct, reason)
        for p, image, correct, reason in rows
    ]


def _image_task(name: str, evaluation: runner.Evaluation) -> report.ImageTask:
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
    return report.ImageTask(
        name,
        note,
        words,
        [*scores, ("overall", len(evaluation.prompts), model.overall, other.overall)],
        [
            report.ImageTaskExample(request.images[0], request.text, *row)
            for request, *row in itertools.islice(rows, EXAMPLES)
        ],
    )


def _directory(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    return workdir / stage if stage == "rl" else workdir / "train" / stage


def _curves(directory: pathlib.Path, names: tuple[str, ...]) -> list[report.Curve]:
    """Return the curves of metrics along a run, titled without the metrics' group."""
    rows = read_rows(directory / "metrics.jsonl")
    curves = []
    for name in names:
        logged = [row for row in rows if name in row]
        steps = [row["step"] for row in logged]
        values = [float(row[name]) for row in logged]
        curves.append(report.Curve(name.partition("/")[2], steps, values))
    return curves


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "blip3o_jax": blip3o_jax.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": platform.platform(),
    }
