"""Hold the steps that every demonstration has: time its parts, train its recipe, show its curves,
its autoencoder and its tokens.
"""

import contextlib
import pathlib
import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from blip3o_jax import checksums, parameter_counts
from blip3o_jax import config as config_lib
from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import Config, UserError
from blip3o_jax.data import images
from blip3o_jax.evaluation import report_contents as contents
from blip3o_jax.provenance import provenance
from blip3o_jax.train import recipe as recipes
from blip3o_jax.train.loop import Summary
from blip3o_jax.train.metrics import read_rows

# By the kind of a stage (`Config.title`): its name in a recipe is free.
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
DURATIONS = "durations.json"  # in the working directory
# Of the report of a smoke run.
FAST_FACT = {"smoke run": "--fast, too few steps to learn much"}
SHOWN = 8  # pictures of the autoencoder, and of the image tokens


def train(stages: Mapping[str, Config], workdir: pathlib.Path, clock: "Clock") -> None:
    """Train the stages under `workdir`/train, or what is left of them."""
    for name, summary in recipes.run(dict(stages), workdir / "train").items():
        clock.trained(shown_name(name, stages[name]), summary)


@contextlib.contextmanager
def quick_compile() -> Iterator[None]:
    """Compile without most optimizations: programs that run for a few steps spend most time in the
    compiler.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


class Clock:
    """Measure the seconds of named parts, in order, and the peak memory in GiB, over all starts of
    the demonstration in `workdir`: a part that an earlier start has done keeps what it took then,
    since a later start finds its result and takes less. Starts with and without `fast` do
    different work and are counted separately.
    """

    def __init__(self, workdir: pathlib.Path, *, fast: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._path = workdir / DURATIONS
        self._fast = fast
        before: dict[str, Any] = _read_durations(self._path)
        if before.get("fast") != fast:
            before = {"parts": {}, "peak_memory_gib": 0.0}
        self._before = before

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"--- {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        cpu_began = time.process_time()
        yield
        # Not in a finally: a part that fails has no duration.
        took = [time.monotonic() - began, time.process_time() - cpu_began]
        self.seconds[name], self.cpu_seconds[name] = self._before["parts"].get(name, took)
        self._write()

    def trained(self, name: str, summary: Summary) -> None:
        """Count a stage of training, whose own log adds up what it took. The parts after a stage
        that was trained further are measured again.
        """
        if summary.metrics:
            self._before["parts"].clear()
        self.seconds[name] = summary.seconds
        self.cpu_seconds[name] = summary.cpu_seconds
        self._write()

    def peak_memory(self) -> float:
        """Return the largest peak memory of the processes of all starts, GiB."""
        # ru_maxrss is in KiB on Linux.
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return max(now, self._before["peak_memory_gib"])

    def _write(self) -> None:
        parts = {name: [self.seconds[name], self.cpu_seconds[name]] for name in self.seconds}
        value = {
            "fast": self._fast,
            "parts": self._before["parts"] | parts,
            "peak_memory_gib": self.peak_memory(),
        }
        checksums.write_json(self._path, value)


def _read_durations(path: pathlib.Path) -> dict[str, Any]:
    """Return what `Clock` wrote for earlier starts: {"fast", "parts": {name: [seconds, CPU
    seconds]}, "peak_memory_gib"}.
    """
    if not path.exists():
        return {"parts": {}, "peak_memory_gib": 0.0}
    try:
        return checksums.read_json(path)
    except checksums.DamagedFile as error:
        raise UserError(f"{error}, or remove it: the report then counts from now on") from error


def inner_workings(
    pipeline: pipelines.Pipeline,
    originals_BHWC: np.ndarray,
    captions: Sequence[str],
    samples: tuple[np.ndarray, np.ndarray, Sequence[str]],
) -> dict[str, Any]:
    """Return the fields of a report on the autoencoder and the image tokens, of real pictures with
    their captions and of `samples`: (images, codes, captions).
    """
    tokenizer = pipeline.config.model.tokenizer
    views_BTTC = np.stack([images.crop_and_resize(x, tokenizer.image_size) for x in originals_BHWC])
    real = zip(originals_BHWC, pipeline.codes(views_BTTC), captions, strict=False)
    sampled = zip(*(values[:SHOWN] for values in samples), strict=False)

    def token_map(image: np.ndarray, ids: np.ndarray, caption: str) -> contents.TokenMap:
        return contents.TokenMap(image, ids.reshape(tokenizer.grid, tokenizer.grid), caption)

    return {
        "reconstructions": [
            contents.Reconstruction(*pair)
            for pair in zip(originals_BHWC, pipeline.autoencode(originals_BHWC), strict=True)
        ],
        "token_maps": [
            *(token_map(*found) for found in real),
            *(token_map(image, ids, f"sampled: {caption}") for image, ids, caption in sampled),
        ],
    }


def facts_of_run(
    workdir: pathlib.Path, stages: Mapping[str, Config], config: Config, clock: "Clock"
) -> dict[str, Any]:
    """Return the fields of a report on the run: curves of its stages, sizes, durations, settings
    and versions.
    """
    parameters = sum(
        row["parameters"] for row in parameter_counts.count_parameters(config).values()
    )
    return {
        "stages": [
            contents.Stage(
                shown_name(name, stage),
                curves(stage_directory(workdir, name), CURVES[stage.title]),
                NOTES[stage.title],
            )
            for name, stage in stages.items()
        ],
        "seconds": clock.seconds,
        "facts": {
            "parameters": f"{parameters / 1e6:.1f} M",
            "peak memory": f"{clock.peak_memory():.1f} GiB",
        },
        "configuration": {
            shown_name(name, stage): config_lib.to_dict(stage) for name, stage in stages.items()
        },
        "versions": _versions(),
    }


def shown_name(name: str, stage: Config) -> str:
    """Return the name of a stage in a report; a single config, named "", is called by its kind."""
    return name or stage.title


def stage_directory(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Return the directory of a stage's run."""
    return workdir / stage if stage == "rl" else workdir / "train" / stage


def curves(directory: pathlib.Path, names: tuple[str, ...]) -> list[contents.Curve]:
    """Return the curves of metrics along a run, titled without the metrics' group; each with that
    of held-out records, eval/NAME, where the run has one.
    """
    rows = read_rows(directory / "metrics.jsonl")
    found = []
    for name in names:
        title = name.partition("/")[2]
        held_out = _series(rows, f"eval/{title}") if name.startswith("train/") else ([], [])
        found.append(contents.Curve(title, *_series(rows, name), held_out if held_out[0] else None))
    return found


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of a metric where it was written."""
    logged = [row for row in rows if name in row]
    return [row["step"] for row in logged], [float(row[name]) for row in logged]


def _versions() -> dict[str, str]:
    made = provenance(shlex.join(["blip3o", *sys.argv[1:]]))
    return {
        "command": made["command"],
        "date": made["date"],
        **made["versions"],
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": platform.platform(),
    }
