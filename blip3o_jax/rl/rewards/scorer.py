"""What runs in a scorer process of the reward server: decoding images and judging them. Imports
little at the top, so that a process starts fast.

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
class Verdict:
    """One image's score, if `status` is 200, else `reason` in one line: 400 a broken image, 422 a
    prompt that the reward cannot judge, 500 a reward that failed."""

    status: int
    reason: str = ""
    total: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


def start(rewards: tuple[RewardConfig, ...], threads: int) -> None:
    """Make the rewards, with `threads` threads in whatever library asks the environment. Run first
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
) -> tuple[list[Verdict], float]:
    """Judge files of `png.parse`, all of `size` (height, width), beside their prompts and metadata
    (JSON). Return a verdict each and the seconds that the rewards took."""
    rows = [(text, json.loads(fields)) for text, fields in zip(prompts, metadata, strict=True)]
    return judge(worker.rewards(), files, size, rows)


def judge(
    rewards: "WeightedRewards",
    files: Sequence["np.ndarray"],
    size: tuple[int, int],
    prompts: Sequence[tuple[str, dict[str, Any]]],
) -> tuple[list[Verdict], float]:
    import numpy as np

    images_BHWC = np.empty((len(files), *size, 3), np.uint8)
    verdicts = [_prepared(rewards, *row) for row in zip(files, images_BHWC, prompts, strict=True)]
    rows = [row for row, verdict in enumerate(verdicts) if verdict is None]
    began = time.monotonic()
    if rows:
        # All of them as a rule; a copy only where one is missing.
        chosen_BHWC = images_BHWC if len(rows) == len(files) else images_BHWC[rows]
        outcome = rewards(chosen_BHWC, *zip(*(prompts[row] for row in rows), strict=True))
        for row, verdict in zip(rows, _verdicts(outcome), strict=True):
            verdicts[row] = verdict
    return verdicts, time.monotonic() - began


def _prepared(
    rewards: "WeightedRewards",
    file: "np.ndarray",
    out_HWC: "np.ndarray",
    prompt: tuple[str, dict[str, Any]],
) -> Verdict | None:
    """Decode an image into `out_HWC`; return why it cannot be judged, or None."""
    from blip3o_jax.rl.rewards import png

    try:
        rewards.check(*prompt)
        png.decode_into(file, out_HWC)
    except png.BadPng as error:
        return Verdict(400, f"an image {error}")
    except UserError as error:
        return Verdict(422, first_line(error))
    except Exception as error:
        return Verdict(500, f"the reward failed: {type_and_line(error)}"[:300])
    return None


def _verdicts(outcome: "Outcome") -> list[Verdict]:
    verdicts = []
    for row, reason in enumerate(outcome.reasons):
        parts = {name: float(values_B[row]) for name, values_B in outcome.parts.items()}
        if reason:
            verdicts.append(Verdict(500, f"the reward failed: {reason}"))
        elif not all(map(math.isfinite, parts.values())):
            verdicts.append(Verdict(500, "the reward failed: a part of its score is not finite"))
        else:
            verdicts.append(Verdict(200, "", float(outcome.total_B[row]), parts))
    return verdicts
