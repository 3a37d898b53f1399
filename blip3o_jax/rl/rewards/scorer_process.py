"""Run a scorer process of the reward server: decode images and score them.

Large libraries are imported inside functions, so that a process starts fast.

Shape suffixes: B images, H height, W width, C colour channels.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.config.errors import first_line, type_and_line
from blip3o_jax.rl.rewards import worker

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.rl.rewards.weighted import Outcome, WeightedRewards


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """Hold the score of one image, if `status` is 200, else `reason` in one line: 400 a broken
    image, 422 a prompt that the reward cannot score, 500 a reward that failed."""

    status: int
    reason: str = ""
    total: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


def start(rewards: tuple[RewardConfig, ...], threads: int) -> None:
    """Make the rewards, with `threads` threads in libraries that read the environment. Run first
    in each process."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    worker.make(rewards, threads)
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the server bounds pixels itself, before it sends a file


def score(
    files: Sequence["np.ndarray"],
    size: tuple[int, int],
    prompts: Sequence[str],
    metadata: Sequence[bytes],
) -> tuple[list[ImageScore], float]:
    """Score files of `png.parse`, all of `size` (height, width), with their prompts and metadata
    (JSON). Return a score each and the seconds that the rewards took."""
    rows = [(text, json.loads(fields)) for text, fields in zip(prompts, metadata, strict=True)]
    return score_rows(worker.rewards(), files, size, rows)


def score_rows(
    rewards: "WeightedRewards",
    files: Sequence["np.ndarray"],
    size: tuple[int, int],
    prompts: Sequence[tuple[str, dict[str, Any]]],
) -> tuple[list[ImageScore], float]:
    """Decode and score PNG files of one size; return their scores and the reward's seconds."""
    import numpy as np

    images_BHWC = np.empty((len(files), *size, 3), np.uint8)
    scores: list[ImageScore | None] = [
        _prepare(rewards, *row) for row in zip(files, images_BHWC, prompts, strict=True)
    ]
    rows = [row for row, found in enumerate(scores) if found is None]
    began = time.monotonic()
    if rows:
        # Indexing copies, which is avoided when all images were decoded.
        chosen_BHWC = images_BHWC if len(rows) == len(files) else images_BHWC[rows]
        outcome = rewards(chosen_BHWC, *zip(*(prompts[row] for row in rows), strict=True))
        for row, image_score in zip(rows, _image_scores(outcome), strict=True):
            scores[row] = image_score
    return [found for found in scores if found is not None], time.monotonic() - began


def _prepare(
    rewards: "WeightedRewards",
    file: "np.ndarray",
    out_HWC: "np.ndarray",
    prompt: tuple[str, dict[str, Any]],
) -> ImageScore | None:
    """Decode an image into `out_HWC`; return why it cannot be scored, or None."""
    from blip3o_jax.rl.rewards import png

    try:
        rewards.check(*prompt)
        png.decode_into(file, out_HWC)
    except png.BadPng as error:
        return ImageScore(400, f"an image {error}")
    except UserError as error:
        return ImageScore(422, first_line(error))
    except Exception as error:
        return ImageScore(500, f"the reward failed: {type_and_line(error)}"[:300])
    return None


def _image_scores(outcome: "Outcome") -> list[ImageScore]:
    scores = []
    for row, reason in enumerate(outcome.reasons):
        parts = {name: float(values_B[row]) for name, values_B in outcome.parts.items()}
        if reason:
            scores.append(ImageScore(500, f"the reward failed: {reason}"))
        elif not all(map(math.isfinite, parts.values())):
            scores.append(ImageScore(500, "the reward failed: a part of its score is not finite"))
        else:
            scores.append(ImageScore(200, "", float(outcome.total_B[row]), parts))
    return scores
