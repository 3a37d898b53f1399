"""Score the saved images of a run again, by the same rewards or by others: `blip3o rl rescore`.

A run's directory may come from elsewhere: of the rewards in its config.json only local ones run
(rewards/trust.py), and no text in its lines is used as a path.

It shows the effect of a changed reward over a whole run, without sampling an image. A total that
has risen under one reward and not under another is a sign of reward hacking.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from blip3o_jax import files
from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.data import images
from blip3o_jax.data.record import BadRecord
from blip3o_jax.progress import Progress
from blip3o_jax.rl.log import image_hash, image_path
from blip3o_jax.rl.rewards.pool import RewardPool
from blip3o_jax.rl.rewards.trust import check_trusted
from blip3o_jax.train.checkpoint import find, read_config
from blip3o_jax.train.metrics import parse_rows

TABLE_ROWS = 10  # a row is the mean over some consecutive rollouts


def rescore(
    workdir: pathlib.Path, rewards: tuple[RewardConfig, ...], out: pathlib.Path, *, workers: int = 0
) -> list[dict]:
    """Score all images under `workdir` and write their lines to `out` with {"rescored": {"total",
    "parts"}}; total null where a reward has failed. UserError where an image is missing, or is not
    the one that the run has scored.
    """
    lines = sorted(
        (line for path in sorted(workdir.glob("rollouts*.jsonl")) for line in _lines(path)),
        key=lambda line: (line["rollout"], line["row"]),
    )
    if not lines:
        raise UserError(
            f"{workdir} holds no rollouts.jsonl with lines: name the --workdir of a run of blip3o "
            "rl"
        )
    # Before the rewards are made, which may take minutes: a run that kept no images fails here.
    _image(workdir, lines[0])
    files.check_out_file(out)
    done = []
    with RewardPool(rewards, workers=workers) as pool:
        pool.check([(line["prompt"], line["metadata"]) for line in lines])
        progress = Progress("rescore", len(lines), after="images")
        with progress, files.replacing(out) as file:
            for group in _rollouts(lines):
                images_BHWC = _images(workdir, group)
                result = pool.submit(
                    images_BHWC,
                    [line["prompt"] for line in group],
                    [line["metadata"] for line in group],
                ).result()
                for i, line in enumerate(group):
                    parts = {
                        name: float(x[i]) for name, x in result.parts.items() if np.isfinite(x[i])
                    }
                    total = None if result.failed_B[i] else float(result.total_B[i])
                    done.append(line | {"rescored": {"total": total, "parts": parts}})
                    file.write(json.dumps(done[-1]) + "\n")
                progress.update(len(done))
    return done


def rewards_of(workdir: pathlib.Path) -> tuple[RewardConfig, ...]:
    """Return the rewards of a run, with their weights and clips.

    Raises UserError without a checkpoint, or for rewards that may do more than read the images,
    which the user must name.
    """
    root, _ = find(workdir)
    rewards = read_config(root).rl.rewards
    check_trusted(rewards, f"{root}/config.json")
    return rewards


def print_table(lines: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Print the means of both scores along the run, and their correlation over single images."""
    both = [
        line
        for line in lines
        if line["total"] is not None and line["rescored"]["total"] is not None
    ]
    if not both:
        print(f"none of {len(lines)} images has both scores, {out}")
        return
    table = Table("rollouts", "images", "logged", "rescored", title=f"mean of the rewards, {out}")
    numbers = np.array([line["rollout"] for line in both], int)
    logged, again = (
        np.array(x, float)
        for x in zip(*[(x["total"], x["rescored"]["total"]) for x in both], strict=True)
    )
    for stretch in np.array_split(np.unique(numbers), min(TABLE_ROWS, len(np.unique(numbers)))):
        chosen = np.isin(numbers, stretch)
        means = (f"{x[chosen].mean():.4f}" for x in (logged, again))
        table.add_row(f"{stretch[0]} to {stretch[-1]}", str(chosen.sum()), *means)
    Console().print(table)
    varies = len(both) > 1 and logged.std() > 0 and again.std() > 0
    agreement = (
        f"correlation {np.corrcoef(logged, again)[0, 1]:.3f}"
        if varies
        else "no correlation: one of them never varies"
    )
    print(f"{agreement}; {len(lines) - len(both)} of {len(lines)} images without one of the scores")


def _rollouts(lines: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    numbers = np.array([line["rollout"] for line in lines])
    starts = np.flatnonzero(np.diff(numbers)) + 1
    for first, last in zip([0, *starts], [*starts, len(lines)], strict=True):
        yield lines[first:last]


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of a rollouts.jsonl, except a last one that a kill has cut short.
    UserError, with the line's number, for any other that the log does not write.
    """
    rows, broken = parse_rows(path)
    wrong = [*broken, *(number for number, row in rows.items() if not _is_line(row))]
    if wrong:
        raise UserError(
            f"{path}:{min(wrong)} is no line of a rollout: copy the file again, or delete the line"
        )
    return list(rows.values())


def _is_line(line: dict[str, Any]) -> bool:
    counts = all(
        type(line.get(name)) is int and 0 <= line[name] < 2**63 for name in ("rollout", "row")
    )
    texts = all(isinstance(line.get(name), str) for name in ("prompt", "image"))
    total = line.get("total", "")
    valid = total is None or (type(total) in (int, float) and np.isfinite(float(total)))
    return counts and texts and valid and isinstance(line.get("metadata"), dict)


def _images(workdir: pathlib.Path, group: list[dict[str, Any]]) -> np.ndarray:
    """Return the images of one rollout, uint8 [B, H, W, 3]."""
    found = [_image(workdir, line) for line in group]
    if len({image.shape for image in found}) > 1:
        directory = image_path(workdir, group[0]["rollout"], 0).parent
        raise UserError(
            f"{directory} holds images of several sizes: those of one rollout have one size"
        )
    return np.stack(found)


def _image(workdir: pathlib.Path, line: dict[str, Any]) -> np.ndarray:
    path = image_path(workdir, line["rollout"], line["row"])
    try:
        # PNG only, as the log writes: untrusted files reach no other decoder.
        image = images.decode(path.read_bytes(), formats=("PNG",))
    except (OSError, BadRecord) as e:
        raise UserError(
            f"{path} cannot be read ({e}): a run keeps its images with --config.rl.keep_images=true"
        ) from e
    if image_hash(image) != line["image"]:
        raise UserError(
            f"{path} is not the image of its line in rollouts.jsonl: its SHA-256 differs"
        )
    return image
