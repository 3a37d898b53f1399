"""Generated images as files: one PNG each, a labelled grid, and the prompts beside them."""

import json
import math
import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def write_images(images_BHWC: np.ndarray, prompts: Sequence[str], out: pathlib.Path) -> list[pathlib.Path]:
    """uint8 images -> out/00000.png, ..., out/grid.png, out/prompts.jsonl; returns the paths of the single images."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{i:05d}.png" for i in range(len(images_BHWC))]
    for path, image in zip(paths, images_BHWC, strict=True):
        Image.fromarray(image).save(path)
    labelled_grid(images_BHWC, prompts).save(out / "grid.png")
    with (out / "prompts.jsonl").open("w", encoding="utf-8") as f:
        for path, prompt in zip(paths, prompts, strict=True):
            f.write(json.dumps({"file_name": path.name, "prompt": prompt}, ensure_ascii=False) + "\n")
    return paths


def labelled_grid(images_BHWC: np.ndarray, prompts: Sequence[str], cell: int = 192) -> Image.Image:
    """All images in a near-square grid, each over its prompt (three lines at most)."""
    count = len(images_BHWC)
    columns = math.ceil(math.sqrt(count))
    font = ImageFont.load_default(size=12)
    label, gap = 3 * 15, 8
    width, height = columns * (cell + gap) + gap, math.ceil(count / columns) * (cell + label + gap) + gap
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, prompt) in enumerate(zip(images_BHWC, prompts, strict=True)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + label + gap)
        grid.paste(Image.fromarray(image).resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        lines = textwrap.wrap(prompt, width=cell // 7, max_lines=3, placeholder=" ...")
        draw.text((x, y + cell + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return grid
