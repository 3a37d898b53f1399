"""Run `blip3o demo --config=FILE.py`: train a recipe, sample the captions that it holds out, and
write the report: each sample with the picture of its caption and the nearest training picture.
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from blip3o_jax import files
from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import Config, DataConfig, UserError
from blip3o_jax.data import images
from blip3o_jax.data.record import BadRecord, Record, Source, read_record
from blip3o_jax.data.sequence import text_to_image_prompt
from blip3o_jax.data.sources import open_held_out, open_mixture
from blip3o_jax.demo import chain, own
from blip3o_jax.demo.recipe import fast_steps
from blip3o_jax.evaluation import nearest, report
from blip3o_jax.evaluation import report_contents as contents
from blip3o_jax.samples import write_images

SAMPLED = 96  # held-out captions, at most
CHUNK = 256  # training pictures in memory at once


class Picture(NamedTuple):
    """Hold a picture of the data set as training cuts it, uint8 [H, W, 3], and its caption."""

    caption: str
    image_HWC: np.ndarray


def run(
    stages: dict[str, Config], workdir: str | pathlib.Path, *, fast: bool = False
) -> dict[str, Any]:
    """Run or resume the stages under `workdir`, then sample and report; return {"matched",
    "seconds", ...}. Raises UserError for a recipe that holds nothing out or makes no images.
    """
    final = list(stages.values())[-1]
    if final.stage != "joint" or not final.data.held_out:
        raise UserError(
            "--config needs a recipe whose last stage is joint and holds captions out:"
            " configs/own.py:DATA, or set --config.data.held_out"
        )
    _check_held_out(stages)
    if fast:
        stages = {name: _shortened(stage) for name, stage in stages.items()}
        print(f"--fast: steps {own.listed_steps(stages)}", file=sys.stderr)
    with chain.quick_compile() if fast else contextlib.nullcontext():
        return _run(stages, pathlib.Path(workdir).absolute(), fast)


def _check_held_out(stages: dict[str, Config]) -> None:
    """Raise UserError where an earlier stage trains on captions that the last one holds out."""
    *earlier, (last, final) = stages.items()
    paths = {source.path for source in final.data.all_sources}
    for name, stage in earlier:
        shared = paths & {source.path for source in stage.data.all_sources}
        # Captions are held out by a hash below the fraction: a larger one holds out the same.
        if shared and stage.data.held_out < final.data.held_out:
            raise UserError(
                f"data.held_out is {stage.data.held_out:g} in the stage {name} and"
                f" {final.data.held_out:g} in {last}: {name} would train on captions that the"
                " report holds out; set --config.data.held_out, which is of all stages"
            )


def _shortened(stage: Config) -> Config:
    steps = fast_steps(stage.steps)
    return dataclasses.replace(
        stage,
        steps=steps,
        eval_every=min(stage.eval_every, steps),
        checkpoint=dataclasses.replace(stage.checkpoint, every=steps),
    )


def _run(stages: dict[str, Config], workdir: pathlib.Path, fast: bool) -> dict[str, Any]:
    clock = chain.Clock(workdir, fast=fast)
    chain.train(stages, workdir, clock)
    with clock("sample held-out captions"):
        pipeline = pipelines.load(workdir / "train")
        truths, too_long = held_out_pictures(pipeline)
        captions = [truth.caption for truth in truths]
        generated = pipeline.generate(captions, seed=0, progress=True)
    samples = np.asarray(generated.images)
    with clock("nearest training pictures"):
        data, size = pipeline.config.data, pipeline.config.model.sizes[0]
        found, distances = nearest_pictures(samples, data, size)
    with clock("report"):
        shown = list(zip(truths, samples, found, distances, strict=True))
        _write_images(shown, workdir / "held_out")
        right = nearest.matched(samples, np.stack([truth.image_HWC for truth in truths]))
        facts = dict(chain.FAST_FACT) if fast else {}
        facts |= {"held-out captions too long": str(too_long)} if too_long else {}
        path = workdir / "report.html"
        results = _results(stages, workdir, pipeline, generated.codes, shown, right, clock, facts)
        report.write_report(results, path)
    print(f"report: {path}", file=sys.stderr)
    return {
        "matched": round(float(right.mean()), 4),
        "by_chance": round(1 / min(nearest.CHOICES, len(right)), 4),
        "held_out_captions": len(captions),
        "seconds": round(sum(clock.seconds.values()), 1),
        "cpu_seconds": round(sum(clock.cpu_seconds.values()), 1),
        "report": str(path),
        "fast": fast,
        "peak_memory_gib": round(clock.peak_memory(), 2),
    }


def held_out_pictures(pipeline: pipelines.Pipeline) -> tuple[list[Picture], int]:
    """Return the first picture of each held-out caption, SAMPLED at most, and how many captions
    were left out because they do not fit into a row.
    """
    config = pipeline.config
    model = config.model
    room = config.data.max_length - model.tokenizer.num_tokens
    found: dict[str, Picture] = {}
    too_long = 0
    for chunk in _pictures(open_held_out(config.data), config.data, model.sizes[0]):
        for picture in chunk:
            if picture.caption in found or len(found) == SAMPLED:
                continue
            ids = text_to_image_prompt(pipeline.vocabulary, model.template, picture.caption)
            if len(ids) > room:
                too_long += 1
            else:
                found[picture.caption] = picture
    if len(found) < 2:
        raise UserError(
            f"{config.data.path}: {len(found)} of the held-out captions fit into a row, 2 are"
            " needed: raise data.held_out or data.max_length"
        )
    return list(found.values()), too_long


def nearest_pictures(
    samples_BHWC: np.ndarray, data: DataConfig, size: tuple[int, int]
) -> tuple[list[Picture], np.ndarray]:
    """Return the training picture that is nearest to each sample, and the root mean square errors
    [B]; see `nearest.nearest`.
    """
    best: dict[int, tuple[float, Picture]] = {}
    for chunk in _pictures(open_mixture(data), data, size):
        pictures_NHWC = np.stack([picture.image_HWC for picture in chunk])
        which_B, distance_B = nearest.nearest(samples_BHWC, pictures_NHWC)
        for row, (which, distance) in enumerate(zip(which_B, distance_B, strict=True)):
            if row not in best or distance < best[row][0]:
                best[row] = (float(distance), chunk[which])
    rows = range(len(samples_BHWC))
    return [best[row][1] for row in rows], np.array([best[row][0] for row in rows])


def _pictures(
    sources: Sequence[tuple[Source, float]], data: DataConfig, size: tuple[int, int]
) -> Iterator[list[Picture]]:
    """Yield the captioned pictures of the sources in chunks. Records that cannot be read are left
    out, as in training. Raises OSError for errors of the machine.
    """

    def picture(record: Record) -> Picture | None:
        if record.task != "t2i":
            return None
        image_HWC = images.decode(record.image, max_pixels=data.max_pixels)
        return Picture(record.caption, images.crop_and_resize(image_HWC, size))

    def read(source: Source, index: int) -> Picture | None:
        try:
            return read_record(source, index, picture)
        except BadRecord as error:
            files.raise_trouble(error)
            return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for source, _ in sources:
            for start in range(0, len(source), CHUNK):
                indices = range(start, min(len(source), start + CHUNK))
                chunk = pool.map(read, [source] * len(indices), indices)
                if found := [picture for picture in chunk if picture is not None]:
                    yield found


Shown = tuple[Picture, np.ndarray, Picture, float]  # truth, sample, nearest, its distance


def _write_images(shown: Sequence[Shown], out: pathlib.Path) -> None:
    """Write sample, own picture and nearest training picture side by side for each caption."""
    rows = [
        np.concatenate([sample, truth.image_HWC, near.image_HWC], axis=1)
        for truth, sample, near, _ in shown
    ]
    write_images(rows, [truth.caption for truth, *_ in shown], out)


def _results(
    stages: dict[str, Config],
    workdir: pathlib.Path,
    pipeline: pipelines.Pipeline,
    codes_BN: np.ndarray,
    shown: Sequence[Shown],
    right_B: np.ndarray,
    clock: chain.Clock,
    facts: dict[str, str],
) -> contents.Results:
    comparisons = [
        contents.Comparison(
            truth.caption, sample, truth.image_HWC, near.image_HWC, near.caption, distance
        )
        for truth, sample, near, distance in shown
    ]
    truths = [truth for truth, *_ in shown][: chain.SHOWN]
    samples = np.stack([sample for _, sample, *_ in shown])
    captions = [truth.caption for truth, *_ in shown]
    of_run = chain.facts_of_run(workdir, stages, pipeline.config, clock)
    of_run["facts"] |= facts
    return contents.Results(
        title="BLIP3o-NEXT in JAX: pictures of your own",
        subtitle=(
            f"Every part trained from random weights on {pipeline.config.data.path}, then asked for"
            " captions that were held out."
        ),
        held_out=contents.HeldOutCaptions(
            float(right_B.mean()), min(nearest.CHOICES, len(right_B)), comparisons
        ),
        **chain.inner_workings(
            pipeline,
            np.stack([truth.image_HWC for truth in truths]),
            [truth.caption for truth in truths],
            (samples, codes_BN, captions),
        ),
        **of_run,
    )
