"""Derive the recipe for captioned pictures of one's own from the pictures and the devices; nothing
is set by hand.

    data set -> survey -> held-out fraction, picture size, vocabulary, row lengths
    devices  -> sizes of the model, seconds of a step
    both     -> steps of each stage within BUDGET

The stages are those of the demo (demo/recipe.py). Every number is a function of the data set, the
kind of device and the number of cores, never of the load: the same command derives the same recipe
and resumes.
"""

import dataclasses
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from blip3o_jax import config
from blip3o_jax.config import UserError
from blip3o_jax.data.held_out import caption_hash, is_held_out, threshold
from blip3o_jax.data.sequence import caption_row, text_to_image_row
from blip3o_jax.demo import recipe as demo
from blip3o_jax.demo.recipe import Extent
from blip3o_jax.demo.survey import Survey, survey
from blip3o_jax.parallel.chips import chip_of
from blip3o_jax.parallel.machine import Machine, find_machine
from blip3o_jax.text.tokenizers import SENTENCEPIECE_FILE, train_sentencepiece
from blip3o_jax.text.vocabulary import Vocabulary

MIN_RECORDS = 200  # as docs/how_to/own_images.md says
HELD_OUT = 0.03  # of the records, within these bounds:
MIN_HELD_OUT = 24
MAX_HELD_OUT = 256
MAX_HELD_OUT_FRACTION = 0.2

BUDGET = 570.0  # seconds of training; the rest of 15 minutes compiles, samples and reports
SHARES = {"autoencoder": 0.2, "contrastive": 0.07, "tokenizer": 0.08, "joint": 0.65}
BATCH = {"autoencoder": 8, "contrastive": 64, "tokenizer": 32, "joint": 64}
# Passes over the data set, at most.
EPOCHS = {"autoencoder": 30, "contrastive": 30, "tokenizer": 60, "joint": 60}
MIN_STEPS = 100
EVALUATIONS = 12  # of the held-out loss along a stage

# Examples/s of a stage on two CPU cores with pictures of 64 px, rows of 56 tokens and the sizes of
# the demo, from the CPU seconds of a run on cores that were shared.
EXAMPLES_PER_S = {"autoencoder": 80.0, "contrastive": 172.0, "tokenizer": 420.0, "joint": 120.0}
MEASURED_SIDE = 64
MEASURED_ROW = 56
MEASURED_CORES = 2
# An accelerator in units of these two cores: its peak times the fraction that small models reach,
# over the 5e10 FLOP/s of the cores. An estimate; a kind without a known peak counts as the slowest.
CPU_FLOPS = 5e10
ACCELERATOR_UTILIZATION = 0.02
UNKNOWN_PEAK = 100e12

SIDES = (32, 48, 64, 96, 128)  # pixels, multiples of an image token's side
CPU_SIDE = 64
CPU_ROW = 256  # tokens; longer rows take the time that pictures need
ACCELERATOR_ROW = 512
ROW_QUANTILE = 0.995
PIECES = 448  # of text, with room for the bytes, USUAL_LETTERS, and syllables
MAX_PIECES = 4096
USUAL_LETTERS = 96
ACCELERATOR_SIZES = demo.Sizes(width=384, ar_layers=6, dit_layers=6, codes=2048, dtype="bfloat16")


def recipe(path: str, machine: Machine | None = None) -> dict[str, config.Config]:
    """Return the stages for the data set at `path` on `machine` (by default this one). Raises
    UserError where the pictures are too few, or their captions too alike to hold some out.
    """
    machine = machine or find_machine()
    found = survey(path)
    try:
        held_out = held_out_fraction(found.captions, found.records)
    except UserError as error:
        raise UserError(f"{path}: {error}{found.left_out and f'; {found.left_out}'}") from error
    training = [caption for caption in found.captions if not is_held_out(caption, held_out)]
    on_cpu = machine.platform == "cpu"
    sizes = dataclasses.replace(
        demo.Sizes() if on_cpu else ACCELERATOR_SIZES, text_pieces=text_pieces(training)
    )
    side = image_side(found.sides, CPU_SIDE if on_cpu else SIDES[-1])
    model = demo.model(side, unroll=on_cpu, sizes=sizes)
    limit = CPU_ROW if on_cpu else ACCELERATOR_ROW
    caption_length, row_length = row_lengths(found.captions, training, model, limit)
    extents = stage_extents(
        len(training) * found.records // len(found.captions),
        seconds_per_example(machine, side, row_length, sizes),
        {"contrastive": caption_length, "joint": row_length},
    )
    base = config.Config(
        model=model,
        data=config.DataConfig(
            path=path, workers=0, prefetch=4, held_out=held_out, too_long="truncate"
        ),
        mesh=demo.mesh(),
        log_every=20,
        preview=0,
        sampling=demo.SAMPLING,
    )
    stages = {
        name: evaluated(stage, len(found.captions) - len(training))
        for name, stage in demo.stages(base, extents, cache_dir="runs/own_cache").items()
    }
    _print_derived(found, stages, machine)
    return stages


def held_out_fraction(captions: Sequence[str], records: int) -> float:
    """Return the fraction of captions (data.held_out) that holds out about HELD_OUT of the records,
    but between MIN_HELD_OUT and MAX_HELD_OUT; `captions` are those of all `records`, or of a part
    that stands for them. Raises UserError for a set that is too small, or whose captions are so few
    that one of them has a large part of the records.
    """
    if len(captions) < MIN_RECORDS:
        raise UserError(
            f"{len(captions)} captioned pictures are too few to hold some of them out, which takes"
            f" {MIN_RECORDS}: configs/overfit.py learns a few pictures by heart"
        )
    hashes, counts = np.unique([caption_hash(c) for c in captions], return_counts=True)
    known_N = np.cumsum(counts)  # records of the captions up to each
    wanted = min(max(HELD_OUT * records, MIN_HELD_OUT), MAX_HELD_OUT) * len(captions) / records
    last = int(np.searchsorted(known_N, wanted))  # captions up to this one are held out
    if last + 1 >= len(hashes) or known_N[last] > MAX_HELD_OUT_FRACTION * len(captions):
        raise UserError(
            f"{len(hashes)} different captions of {len(captions)} pictures are too few to hold"
            " some of them out: describe what differs between the pictures"
        )
    return threshold(int(hashes[last]), int(hashes[last + 1]))


def image_side(sides: Iterable[int], largest: int) -> int:
    """Return the side of the training pictures: the largest of SIDES that half of the pictures
    reach by their shorter side, up to `largest`.
    """
    middle = float(np.median(list(sides)))
    return max((side for side in SIDES if side <= min(middle, largest)), default=SIDES[0])


def text_pieces(captions: Iterable[str]) -> int:
    """Return the size of the text vocabulary: room for bytes and letters, of which scripts such as
    Chinese have thousands, and a piece for each word that occurs four times or more.
    """
    words = Counter(word for caption in captions for word in caption.split())
    frequent = sum(count >= 4 for count in words.values())
    letters = len({letter for word in words for letter in word})
    # SentencePiece refuses a vocabulary without room for the letters.
    more = max(0, letters - USUAL_LETTERS)
    return max(
        min(MAX_PIECES, PIECES + 64 * math.ceil((more + frequent) / 64)),
        PIECES + 64 * math.ceil(more / 64),
    )


def row_lengths(
    captions: Sequence[str], training: Sequence[str], model: config.ModelConfig, limit: int
) -> tuple[int, int]:
    """Return the tokens of a caption's row and of a joint row: what ROW_QUANTILE of the captions
    need, multiples of 8 up to `limit`. Longer captions are cut. The vocabulary is the one that the
    run trains on the same `training` captions.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_sentencepiece(
            training, Path(folder) / SENTENCEPIECE_FILE, model.text.train_size, model.template
        )
    vocab = Vocabulary(tokenizer, model.tokenizer.codebook_size)
    image_tokens = model.tokenizer.num_tokens

    def needed(caption: str) -> tuple[int, int]:
        alone = caption_row(vocab, caption, limit, truncate=True)["text_mask"]
        row = text_to_image_row(vocab, model.template, caption, image_tokens, limit, truncate=True)
        return int(alone.sum()), int(row["segment_ids"].sum())

    lengths = np.quantile(np.array([needed(c) for c in captions]), ROW_QUANTILE, axis=0)
    alone, row = (min(limit, 8 * math.ceil(length / 8)) for length in lengths)
    return alone, row


def seconds_per_example(
    machine: Machine, side: int, row_length: int, sizes: demo.Sizes
) -> dict[str, float]:
    """Return the seconds that an example takes in each stage, from those measured on two cores:
    in proportion to pixels, tokens, squared width and layers over the machine's speed.
    """
    usual = demo.Sizes()
    pixels = (side / MEASURED_SIDE) ** 2
    width = (sizes.width / usual.width) ** 2
    layers = (sizes.ar_layers + sizes.dit_layers) / (usual.ar_layers + usual.dit_layers)
    # Half of a joint step is the DiT's, whose tokens follow the pixels.
    joint = (pixels + row_length / MEASURED_ROW) / 2
    work = {
        "autoencoder": pixels * width,
        "contrastive": pixels * width,
        "tokenizer": pixels * width,
        "joint": joint * width * layers,
    }
    speed = relative_speed(machine)
    return {name: work[name] / EXAMPLES_PER_S[name] / speed for name in work}


def relative_speed(machine: Machine) -> float:
    """Return the speed of the machine in units of the two cores that were measured."""
    if machine.platform == "cpu":
        return machine.cores / MEASURED_CORES
    chip = chip_of(machine.kind)
    peak = chip.flops if chip else UNKNOWN_PEAK
    return machine.devices * peak * ACCELERATOR_UTILIZATION / CPU_FLOPS


def stage_extents(
    records: int, seconds: Mapping[str, float], lengths: Mapping[str, int]
) -> dict[str, Extent]:
    """Return how long each stage trains on `records`: what its share of BUDGET allows at `seconds`
    an example, EPOCHS at most. `lengths`: tokens of the rows of stages that have text.
    """
    extents = {}
    for name, batch_size in BATCH.items():
        affordable = BUDGET * SHARES[name] / seconds[name]
        examples = min(affordable, EPOCHS[name] * records)
        steps = max(MIN_STEPS, int(examples / batch_size))
        extents[name] = Extent(steps, batch_size, lengths.get(name, max(lengths.values())))
    return extents


def evaluated(stage: config.Config, held_out: int) -> config.Config:
    """Return the stage with the loss of its held-out records EVALUATIONS times along it."""
    batches = min(8, max(1, held_out // stage.data.batch_size))
    every = max(1, stage.steps // EVALUATIONS)
    return dataclasses.replace(stage, eval_every=every, eval_batches=batches)


def listed_steps(stages: Mapping[str, config.Config]) -> str:
    """Return the stages, each with its number of steps, for a message."""
    return ", ".join(f"{name} {stage.steps}" for name, stage in stages.items())


def _print_derived(found: Survey, stages: Mapping[str, config.Config], machine: Machine) -> None:
    """Print the derived settings, and the devices that they are for, in one line."""
    joint = stages["joint"]
    facts = (
        f"{found.records} records",
        *([found.left_out] if found.left_out else []),
        f"{100 * joint.data.held_out:.1f} % of captions held out",
        f"pictures of {joint.model.image_size} px",
        f"{joint.model.text.train_size} text pieces",
        f"rows of {joint.data.max_length} tokens (longer captions are cut)",
        f"{machine.cores} CPU cores"
        if machine.platform == "cpu"
        else f"{machine.devices} x {machine.kind}",
        # Before the settings of the command line apply.
        f"steps, if not set: {listed_steps(stages)}",
    )
    print(f"{joint.data.path}: {'; '.join(facts)}", file=sys.stderr)
