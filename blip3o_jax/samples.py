"""Generated images as files: one PNG each, a labelled grid, and the prompts beside them."""

import json
import math
import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def write_images(images: Sequence[np.ndarray], prompts: Sequence[str], out: pathlib.Path) -> list[pathlib.Path]:
    """uint8 images [H, W, 3] of any sizes -> out/00000.png, ..., out/grid.png, out/prompts.jsonl; returns the paths of the
    single images."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{i:05d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    labelled_grid(images, prompts).save(out / "grid.png")
    with (out / "prompts.jsonl").open("w", encoding="utf-8") as f:
        for path, prompt in zip(paths, prompts, strict=True):
            f.write(json.dumps({"file_name": path.name, "prompt": prompt}, ensure_ascii=False) + "\n")
    return paths


def labelled_grid(images: Sequence[np.ndarray], prompts: Sequence[str], cell: int = 192) -> Image.Image:
    """All images in a grid with about as many rows as columns, each as large as its cell allows, over its prompt (three lines
    at most)."""
    count = len(images)
    columns = math.ceil(math.sqrt(count))
    font = ImageFont.load_default(size=12)
    label, gap = 3 * 15, 8
    sizes = [[max(1, round(cell * side / max(image.shape[:2]))) for side in image.shape[:2]] for image in images]
    high = max(height for height, _ in sizes)
    width, height = columns * (cell + gap) + gap, math.ceil(count / columns) * (high + label + gap) + gap
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, (tall, wide), prompt) in enumerate(zip(images, sizes, prompts, strict=True)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (high + label + gap)
        grid.paste(Image.fromarray(image).resize((wide, tall), Image.Resampling.LANCZOS), (x, y))
        lines = textwrap.wrap(prompt, width=cell // 7, max_lines=3, placeholder=" ...")
        draw.text((x, y + high + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return grid
