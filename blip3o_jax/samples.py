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
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    out: pathlib.Path,
    inputs: Sequence[Sequence[np.ndarray]] | None = None,
) -> list[pathlib.Path]:
    """Write images to out/00000.png, ..., out/grid.png and out/prompts.jsonl; return their paths.

    `images` are uint8 [H, W, 3] of any sizes; `inputs` are those that each was made from, which the
    grid shows on its left. The grid is not among the returned paths. The files
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
        _save(labelled_grid(images, prompts, inputs=inputs), staging / "grid.png")
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
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    cell: int = 192,
    inputs: Sequence[Sequence[np.ndarray]] | None = None,
) -> Image.Image:
    """Return a grid of all images, with about as many rows as columns.

    Each image is scaled to a square of `cell` pixels and has its prompt below, in up to three
    lines. Its inputs, if any, stand on its left with an arrow between, the prompt below all.
    """
    shown = [
        [*given, image] for image, given in zip(images, inputs or [()] * len(images), strict=True)
    ]
    squares = max(map(len, shown))
    gap = 8
    label = 3 * 15
    # Between the last input and the output stands an arrow, elsewhere a gap.
    arrow = 20 if squares > 1 else 0
    cell_width = squares * cell + max(0, squares - 2) * gap + arrow
    columns = math.ceil(math.sqrt(len(images) / squares))
    font = ImageFont.load_default(size=12)
    scaled = [[_scaled(image, cell) for image in group] for group in shown]
    cell_height = max(image.height for group in scaled for image in group)
    width = columns * (cell_width + gap) + gap
    height = math.ceil(len(images) / columns) * (cell_height + label + gap) + gap
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (group, prompt) in enumerate(zip(scaled, prompts, strict=True)):
        x = gap + i % columns * (cell_width + gap)
        y = gap + i // columns * (cell_height + label + gap)
        text = "\n".join(
            textwrap.wrap(prompt, width=cell_width // 7, max_lines=3, placeholder=" ...")
        )
        draw.text((x, y + cell_height + 2), text, fill="black", font=font, spacing=2)
        for number, image in enumerate(group, 1):
            if number == len(group) > 1:
                x += arrow - gap
                _draw_arrow(draw, x - arrow, y + cell_height // 2, arrow)
            grid.paste(image, (x, y))
            x += cell + gap
    return grid


def _scaled(image: np.ndarray, side: int) -> Image.Image:
    """Return the image with its longer side of `side` pixels."""
    height, width = (max(1, round(side * n / max(image.shape[:2]))) for n in image.shape[:2])
    return Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)


def _draw_arrow(draw: ImageDraw.ImageDraw, x: int, y: int, width: int) -> None:
    """Draw an arrow to the right in the `width` pixels from x on."""
    draw.line([(x + 4, y), (x + width - 4, y)], fill="black", width=2)
    tip = x + width - 3
    draw.polygon([(tip, y), (tip - 6, y - 5), (tip - 6, y + 5)], fill="black")
