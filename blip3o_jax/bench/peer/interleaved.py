"""Time the same weights and work in JAX and in PyTorch, interleaved.

Each side is a separate process (worker.py) with as many threads. They take turns: in every round
each side runs one stretch of the item while the others sleep, in an order that is reversed from
round to round, so that a machine that slows down slows all sides. Compiling and the first calls are
reported separately. The first call of a stretch is run and not counted. Results that both sides
should compute alike are compared before the timing. On a CPU all sides have the environment that
parallel/flags.py recommends, except variables that are already set.

    train_step          one optimizer step of the joint stage on cached codes and latents
    train_step_online   the same with the frozen encoders in it
    ar_decode           all image tokens of a batch: JAX one pass on a cache, PyTorch `generate` and
                        a second pass
    dit_step            one denoising step with guidance: a sampling loop over its number of steps
    vae_encode, vae_decode, tokenizer, text_to_image
"""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np

from blip3o_jax.bench.peer import report as peer_report
from blip3o_jax.bench.peer.worker import Arrays, Task, Worker
from blip3o_jax.config import ModelConfig, SamplingConfig, UserError, check, check_choice
from blip3o_jax.config.errors import install_command
from blip3o_jax.convert.report import relative_error
from blip3o_jax.convert.source import open_source
from blip3o_jax.convert.stock_config import OWN_FIELDS
from blip3o_jax.data.sequence import (
    padded_length,
    padded_prompts,
    text_to_image_prompt,
    text_to_image_row,
)
from blip3o_jax.provenance import provenance
from blip3o_jax.text.tokenizers import load_tokenizer
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train.checkpoint import find, read_config, stored_text

ITEMS = (
    "train_step",
    "train_step_online",
    "ar_decode",
    "dit_step",
    "vae_encode",
    "vae_decode",
    "tokenizer",
    "text_to_image",
)
DEVICES = ("cpu", "gpu")
CAPTIONS = (
    "a red circle",
    "a large blue square above a small green triangle",
    "two yellow stars",
    "a small purple ring to the left of a red cross",
)
LEARNING_RATE = 1e-4
# Norm of the difference over the norm: more than rounding makes in float32 and in bfloat16, less
# than other weights would.
TOLERANCE = {"cpu": 1e-3, "gpu": 0.1}
# a side's turn lasts at least this long, so that short items are not lost in the noise
MIN_TURN_SECONDS = 0.3
MAX_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """Hold the options of the command."""

    device: str = "cpu"
    rounds: int = 7
    batch_size: int = 4
    threads: int = 2
    jax_devices: int = 1
    items: tuple[str, ...] = ITEMS
    compiled: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("--device", self.device, DEVICES)
        for item in self.items:
            check_choice("--items", item, ITEMS)
        for name in ("rounds", "batch_size", "threads", "jax_devices"):
            check(getattr(self, name) > 0, f"--{name}={getattr(self, name)} must be positive")


def bench(
    torch_dir: pathlib.Path,
    checkpoint: pathlib.Path,
    out: pathlib.Path,
    options: Options,
    command: str,
) -> dict[str, Any]:
    """Run the items, write OUT/peer.json and OUT/peer.md, and return the report. UserError for
    directories that do not hold the same model, a missing library or device.
    """
    _check_torch()
    source = open_source(torch_dir)
    root, _ = find(checkpoint)
    config = read_config(root)
    _check_same_model(source.config.model, config.model, torch_dir, root)
    vocabulary = Vocabulary(
        load_tokenizer(stored_text(root, config.model.text)),
        source.config.model.tokenizer.codebook_size,
    )
    settings = dataclasses.replace(config.sampling, batch_size=options.batch_size)
    inputs = make_inputs(config.model, vocabulary, options)
    out.mkdir(parents=True, exist_ok=True)

    report: dict[str, Any] = {
        **provenance(command),
        "machine": peer_report.machine(),
        "options": dataclasses.asdict(options),
        "sampling": dataclasses.asdict(settings),
        "model": peer_report.sizes(source.tensors),
        "items": [],
    }
    tasks = {
        side: Task(
            side=side,
            directory=(checkpoint if side == "jax" else torch_dir).absolute(),
            device=options.device,
            threads=options.threads,
            jax_devices=options.jax_devices,
            batch_size=options.batch_size,
            settings=settings,
            image_token_offset=vocabulary.image_token_offset,
        )
        for side in ("jax", "torch", "torch_compiled")[: 3 if options.compiled else 2]
    }
    bench = _Bench(tasks, options, settings)
    try:
        for item in options.items:
            report["items"].append(bench.run(item, inputs))
            peer_report.write(
                report | {"sides": bench.about}, out
            )  # a run that is stopped leaves what it has
    finally:
        bench.close()
    return report | {"sides": bench.about}


def _check_torch() -> None:
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"bench peer compares with PyTorch, but {error.name} is not installed:"
            f" {install_command('convert')}"
        ) from error


def _check_same_model(
    theirs: ModelConfig, ours: ModelConfig, torch_dir: pathlib.Path, root: pathlib.Path
) -> None:
    """Raise UserError naming the first field in which the two configurations describe different
    networks.
    """

    def differing(a: Any, b: Any, path: str) -> list[str]:
        found = []
        for field in dataclasses.fields(a):
            name, (x, y) = f"{path}{field.name}", (getattr(v, field.name) for v in (a, b))
            if field.name in OWN_FIELDS or field.name in (
                "text",
                "template",
                "text_tower",
                "editing",
            ):
                continue
            if dataclasses.is_dataclass(x):
                found += differing(x, y, f"{name}.")
            elif x != y:
                found.append(f"{name} is {x} in {torch_dir} and {y} in {root}")
        return found

    if found := differing(theirs, ours, "model."):
        raise UserError(
            f"{found[0]}: they do not hold the same model; make one from the other with blip3o "
            "convert"
        )


def make_inputs(model: ModelConfig, vocabulary: Vocabulary, options: Options) -> Arrays:
    """Return all arrays that items take; both sides get the same."""
    rng = np.random.default_rng(options.seed)
    batch = options.batch_size
    n = model.tokenizer.num_tokens
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    scale = model.tokenizer.pool_scale
    prompts = [
        text_to_image_prompt(vocabulary, model.template, caption, scale) for caption in captions
    ]
    longest = max(map(len, prompts))
    tokens_BL, lengths_B = padded_prompts(prompts, padded_length(longest))
    tail = 2 + len(vocabulary.encode("\n"))
    rows = [
        text_to_image_row(vocabulary, model.template, caption, n, longest + n + tail, scale)
        for caption in captions
    ]
    latents = (batch, model.latent_size, model.latent_size, model.vae.latent_channels)
    side = model.tokenizer.image_size
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {
        "captions": np.array(captions),
        "prompts": tokens_BL,
        "lengths": lengths_B,
        "codes": rng.integers(0, model.tokenizer.codebook_size, (batch, n), np.int32),
        "latents": rng.normal(size=latents).astype(np.float32),
        "start": rng.normal(size=latents).astype(np.float32),
        "hidden": rng.normal(size=(batch, n + 1, model.ar.hidden_size)).astype(np.float32),
        "pixels": rng.integers(0, 256, (batch, model.image_size, model.image_size, 3), np.uint8),
        "tokenizer_pixels": rng.integers(0, 256, (batch, side, side, 3), np.uint8),
        "learning_rate": np.array(LEARNING_RATE, np.float32),
    }


class _Bench:
    """Hold the worker processes. On a GPU each item has new ones, since memory peaks cannot be
    reset there.
    """

    def __init__(self, tasks: dict[str, Task], options: Options, settings: SamplingConfig):
        self.tasks = tasks
        self.options = options
        self.settings = settings
        self.about: dict[str, Any] = {}
        self._workers: dict[str, Worker] = {}

    def run(self, item: str, inputs: Arrays) -> dict[str, Any]:
        """Run one item on all sides."""
        if not self._workers:
            self._workers = {side: Worker(task) for side, task in self.tasks.items()}
        self.about = self.about or {
            side: worker.request("describe") for side, worker in self._workers.items()
        }
        started, failed = self._start(item, inputs)
        errors = differences(item, started, self.options.device)
        seconds = self._rounds(item, started)
        peaks = {side: self._workers[side].request("finish") for side in started}
        if self.options.device == "gpu":
            self.close()
        steps = self.settings.steps if item == "dit_step" else 1
        sides = {
            side: peer_report.summary([s / steps for s in seconds[side]], peaks[side], start)
            for side, start in started.items()
        }
        result = {
            "item": item,
            "work": self._work(item, inputs),
            "sides": sides,
            "failed": failed,
            "difference": errors,
        }
        cost = {name: value / steps for name, value in started["jax"]["cost"].items()}
        return peer_report.with_rates(result | {"cost": cost}, self.about)

    def _start(self, item: str, inputs: Arrays) -> tuple[dict[str, Any], dict[str, str]]:
        """Return ({side: its reply once warm}, {side: why it does not compile})."""
        started, failed = {}, {}
        for side, worker in self._workers.items():
            _log(f"{item}  {side}  compiling and warming up")
            try:
                started[side] = worker.request("start", item, inputs)
            except RuntimeError as error:
                if side != "torch_compiled":
                    raise
                failed[side] = str(error).strip().splitlines()[-1][:200]
                _log(f"{item}  {side}  does not compile: {failed[side]}")
                worker.request("abandon")
            else:
                # Such as the tokens that one side has sampled, which the others then process too.
                inputs = inputs | started[side]["shared"]
        return started, failed

    def _rounds(self, item: str, started: dict[str, Any]) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {side: [] for side in started}
        order = list(started)
        for number in range(self.options.rounds):
            # Reversed in every second round: a drift of the machine's speed affects all sides
            # alike.
            for side in order if number % 2 == 0 else reversed(order):
                last = min(seconds[side], default=started[side]["warm_s"])
                times = min(MAX_REPEATS, max(1, round(MIN_TURN_SECONDS / max(last, 1e-9))))
                seconds[side] += self._workers[side].request("repeat", times)
            medians = "  ".join(
                f"{side} {np.median(s) * 1e3:.1f} ms" for side, s in seconds.items()
            )
            _log(f"{item}  round {number + 1}/{self.options.rounds}  {medians}")
        return seconds

    def _work(self, item: str, inputs: Arrays) -> dict[str, Any]:
        """Return how much one repetition does, in the unit of its rate."""
        batch, steps = self.options.batch_size, self.settings.steps
        if item.startswith("train_step"):
            return {
                "count": batch,
                "unit": "examples",
                "note": f"rows of {inputs['tokens'].shape[1]} tokens",
            }
        if item == "ar_decode":
            return {
                "count": batch * inputs["codes"].shape[1],
                "unit": "tokens",
                "note": f"{batch} rows",
            }
        if item == "dit_step":
            return {"count": batch, "unit": "images", "note": f"each of {steps} steps"}
        return {"count": batch, "unit": "images", "note": ""}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers = {}


def differences(item: str, started: dict[str, Any], device: str) -> dict[str, float]:
    """Return by how much each side's outputs differ from this package's: relative errors, for ids
    the fraction that differs.
    """
    wanted, found = started["jax"]["outputs"], {}
    for side, start in started.items():
        if side == "jax" or not wanted:
            continue
        errors = [
            float(np.mean(wanted[name] != got))
            if name == "ids"
            else relative_error(wanted[name], got)
            for name, got in start["outputs"].items()
        ]
        found[side] = max(errors)
        if not found[side] <= TOLERANCE[device] and not (
            item == "tokenizer" and found[side] < 0.01 + TOLERANCE[device]
        ):
            raise UserError(
                f"bench peer: {item} of {side} differs from JAX's by {found[side]:.1e}: the "
                "directories do not hold the same "
                "weights; blip3o convert verify says which"
            )
    return found


def _log(line: str) -> None:
    print(f"peer  {line}", file=sys.stderr, flush=True)
