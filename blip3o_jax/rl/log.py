"""Write the log of a run of reinforcement learning: a line an image in rollouts.jsonl, and pictures
of the best and worst.

    {"rollout": 3, "row": 17, "index": 209, "seed": 0, "prompt": ..., "metadata": {...},
     "total": 0.5 or null, "parts": {...}, "image": its SHA-256}

The image was sampled from `index` and `seed`; `total` is null where its reward failed. Each host
writes the images that it has scored: the first to rollouts.jsonl, host N to rollouts-N.jsonl. With
`rl.keep_images` the images are saved next to it, in rollouts/ROLLOUT/ROW.png.
"""

import hashlib
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from blip3o_jax import files
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.rl.reward_batch import RewardBatch
from blip3o_jax.samples import labelled_grid
from blip3o_jax.train.metrics import JsonLines

KEYS = ("rollout", "row")  # of a line
GRID_IMAGES = 6  # of the best, and of the worst, in a picture


class RolloutLog:
    """Write rollouts.jsonl.

    Lines of rollouts from `start` on are dropped on opening: a run that resumes writes them again.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        process_index: int,
        start: int,
        seed: int,
        *,
        keep_images: bool = False,
    ):
        path = directory / (
            "rollouts.jsonl" if process_index == 0 else f"rollouts-{process_index}.jsonl"
        )
        self._directory = directory
        self._seed = seed
        self._keep_images = keep_images
        self._lines = JsonLines(path, KEYS, lambda line: line["rollout"] < start)

    @property
    def path(self) -> pathlib.Path:
        return self._lines.path

    def write(
        self,
        rollout: int,
        rows: Sequence[int],
        first: int,
        prompts: Sequence[Prompt],
        images: np.ndarray,
        rewards: RewardBatch,
    ) -> None:
        """Write a line for each image of one rollout. `rows`: their places in the rollout; `first`:
        the index of its row 0; all others have one entry a row.
        """
        lines = []
        for i, (row, prompt, image) in enumerate(zip(rows, prompts, images, strict=True)):
            parts = {name: float(x[i]) for name, x in rewards.parts.items() if math.isfinite(x[i])}
            line = {
                "rollout": rollout,
                "row": row,
                "index": first + row,
                "seed": self._seed,
                "prompt": prompt.text,
                "metadata": prompt.metadata,
                "total": None if rewards.failed_B[i] else float(rewards.total_B[i]),
                "parts": parts,
                "image": image_hash(image),
            }
            if self._keep_images:
                path = image_path(self._directory, rollout, row)
                path.parent.mkdir(parents=True, exist_ok=True)
                with files.writing(path):
                    Image.fromarray(image).save(path)
            lines.append(line)
        self._lines.write(*lines)

    def sync(self) -> None:
        """Flush all lines to disk: a run that resumes from a step writes no rollout before it
        again."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


def image_hash(image_HWC: np.ndarray) -> str:
    """Return the SHA-256 of an image's pixels in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(image_HWC).tobytes()).hexdigest()


def image_path(directory: pathlib.Path, rollout: int, row: int) -> pathlib.Path:
    """Return the path of an image that `rl.keep_images` saves."""
    return directory / "rollouts" / f"{rollout:06d}" / f"{row:05d}.png"


def best_and_worst(images: np.ndarray, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
    """Return the images of the highest rewards, then those of the lowest, over their prompts, as a
    grid uint8 [1, H, W, 3].
    """
    order = np.argsort(-rewards, kind="stable")
    # With fewer images than two rows, none is shown twice.
    chosen = [*order[:GRID_IMAGES], *order[GRID_IMAGES:][-GRID_IMAGES:]]
    labels = [f"{rewards[i]:.2f} {prompts[i]}" for i in chosen]
    return np.asarray(labelled_grid([images[i] for i in chosen], labels))[None]
