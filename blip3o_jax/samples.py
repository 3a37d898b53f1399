"""Generated images as files: one PNG each, a labelled grid, and the prompts beside them."""

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

_LIST = "prompts.jsonl"  # written last: where it is, the images beside it are its own
_NEW = ".new"
_NAME = re.compile(r"\d{5,}\.png")


def write_images(
    images: Sequence[np.ndarray], prompts: Sequence[str], out: pathlib.Path
) -> list[pathlib.Path]:
    """uint8 images [H, W, 3] of any sizes -> out/00000.png, ..., out/grid.png, out/prompts.jsonl;
    returns the paths of the single images.

    They take the place of an earlier call's as a set: all are written beside it before any of those
    is removed. A kill meanwhile leaves the old ones, or some of the new, never both. UserError as
    of `check_images_out`; OSError names the file.
    """
    check_images_out(out)
    new = out / _NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        names = [f"{i:05d}.png" for i in range(len(images))]
        for name, image in zip(names, images, strict=True):
            _save(Image.fromarray(image), new / name)
        _save(labelled_grid(images, prompts), new / "grid.png")
        pairs = zip(names, prompts, strict=True)
        lines = [
            json.dumps({"file_name": name, "prompt": prompt}, ensure_ascii=False) + "\n"
            for name, prompt in pairs
        ]
        files.replace_text(new / _LIST, "".join(lines))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    (out / _LIST).unlink(missing_ok=True)
    for path in out.iterdir():
        if path != new:
            path.unlink()
    for name in (*names, "grid.png", _LIST):
        (new / name).replace(out / name)
    new.rmdir()
    return [out / name for name in names]


def check_images_out(out: pathlib.Path) -> None:
    """UserError unless `out` is a directory, or can become one, that holds nothing but an earlier
    `write_images`. To be called before the work whose images go there.
    """
    files.check_out_directory(out)
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = {name for name in there if name in ("grid.png", _LIST, _NEW) or _NAME.fullmatch(name)}
    known = ours if {_LIST, _NEW} & there else set()  # _NEW alone: of a call that was killed
    if other := sorted(there - known):
        raise UserError(
            f"{out} holds {other[0]}, which is none of the images of an earlier run: choose another directory, or move it away"
        )


def _save(image: Image.Image, path: pathlib.Path) -> None:
    with files.writing(path):
        image.save(path)


def labelled_grid(
    images: Sequence[np.ndarray], prompts: Sequence[str], cell: int = 192
) -> Image.Image:
    """All images in a grid with about as many rows as columns, each as large as its cell allows,
    over its prompt (three lines at most).
    """
    count = len(images)
    columns = math.ceil(math.sqrt(count))
    font = ImageFont.load_default(size=12)
    label, gap = 3 * 15, 8
    sizes = [
        [max(1, round(cell * side / max(image.shape[:2]))) for side in image.shape[:2]]
        for image in images
    ]
    high = max(height for height, _ in sizes)
    width, height = (
        columns * (cell + gap) + gap,
        math.ceil(count / columns) * (high + label + gap) + gap,
    )
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, (tall, wide), prompt) in enumerate(zip(images, sizes, prompts, strict=True)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (high + label + gap)
        grid.paste(Image.fromarray(image).resize((wide, tall), Image.Resampling.LANCZOS), (x, y))
        lines = textwrap.wrap(prompt, width=cell // 7, max_lines=3, placeholder=" ...")
        draw.text((x, y + high + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return grid
