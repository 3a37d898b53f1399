"""Write sampled images to files: one PNG each, a labelled grid, and the list of their prompts."""

import json
import math
import pathlib
import re
import shutil
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax import files
from blip3o_jax.config import UserError

_PROMPTS_FILE = "prompts.jsonl"  # written last: it marks a complete set of images
_STAGING_DIRECTORY = ".new"
_NAME = re.compile(r"\d{5,}\.png")


def write_images(
    images: Sequence[np.ndarray], prompts: Sequence[str], out: pathlib.Path
) -> list[pathlib.Path]:
    """Write images to out/00000.png, ..., out/grid.png and out/prompts.jsonl; return their paths.

    `images` are uint8 [H, W, 3] of any sizes; the grid is not among the returned paths. The files
    replace those of an earlier call together: all are written to a staging directory before the old
    ones are removed. A process killed in between leaves old files or new files, never both. Raises
    UserError as `check_images_out` does; an OSError names the file.
    """
    check_images_out(out)
    staging = out / _STAGING_DIRECTORY
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        names = [f"{i:05d}.png" for i in range(len(images))]
        for name, image in zip(names, images, strict=True):
            _save(Image.fromarray(image), staging / name)
        _save(labelled_grid(images, prompts), staging / "grid.png")
        pairs = zip(names, prompts, strict=True)
        lines = [
            json.dumps({"file_name": name, "prompt": prompt}, ensure_ascii=False) + "\n"
            for name, prompt in pairs
        ]
        files.replace_text(staging / _PROMPTS_FILE, "".join(lines))
    # BaseException: Ctrl-C must not leave a staging directory either.
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    # The list of prompts goes first and comes back last: whoever finds it finds all images.
    (out / _PROMPTS_FILE).unlink(missing_ok=True)
    for path in out.iterdir():
        if path != staging:
            path.unlink()
    for name in (*names, "grid.png", _PROMPTS_FILE):
        (staging / name).replace(out / name)
    staging.rmdir()
    return [out / name for name in names]


def check_images_out(out: pathlib.Path) -> None:
    """Raise UserError unless `write_images` can write to the directory `out`.

    It must be absent, empty, or hold only the files of an earlier call. Call this before sampling.
    """
    files.check_out_directory(out)
    existing = {path.name for path in out.iterdir()} if out.is_dir() else set()
    own_files = {
        name
        for name in existing
        if name in ("grid.png", _PROMPTS_FILE, _STAGING_DIRECTORY) or _NAME.fullmatch(name)
    }
    # A staging directory without a prompts file is left by a call that was killed.
    replaceable = own_files if {_PROMPTS_FILE, _STAGING_DIRECTORY} & existing else set()
    if other := sorted(existing - replaceable):
        raise UserError(
            f"{out} holds {other[0]}, which is not one of the images of an earlier run: choose "
            "another directory, or move it away"
        )


def _save(image: Image.Image, path: pathlib.Path) -> None:
    with files.writing(path):
        image.save(path)


def labelled_grid(
    images: Sequence[np.ndarray], prompts: Sequence[str], cell: int = 192
) -> Image.Image:
    """Return a grid of all images, with about as many rows as columns.

    Each image is scaled to a cell of `cell` pixels and has its prompt below, in up to three lines.
    """
    count = len(images)
    columns = math.ceil(math.sqrt(count))
    font = ImageFont.load_default(size=12)
    label = 3 * 15
    gap = 8
    sizes = [
        [max(1, round(cell * side / max(image.shape[:2]))) for side in image.shape[:2]]
        for image in images
    ]
    cell_height = max(height for height, _ in sizes)
    width = columns * (cell + gap) + gap
    height = math.ceil(count / columns) * (cell_height + label + gap) + gap
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, (image_height, image_width), prompt) in enumerate(
        zip(images, sizes, prompts, strict=True)
    ):
        x = gap + i % columns * (cell + gap)
        y = gap + i // columns * (cell_height + label + gap)
        grid.paste(
            Image.fromarray(image).resize((image_width, image_height), Image.Resampling.LANCZOS),
            (x, y),
        )
        lines = textwrap.wrap(prompt, width=cell // 7, max_lines=3, placeholder=" ...")
        draw.text((x, y + cell_height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return grid
