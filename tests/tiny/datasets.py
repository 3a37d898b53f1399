"""Write the smallest set of captioned images."""

import atexit
import functools
import io
import json
import pathlib
import shutil
import tempfile

import numpy as np
from PIL import Image

CAPTIONS = tuple(
    f"a {size} {colour} {shape}"
    for size, colour, shape in zip(
        ["small", "big"] * 8,
        ["red", "blue", "green", "pink"] * 4,
        ["cat"] * 3 + ["tall tree"] * 6 + ["boat on a lake"] * 7,
        strict=True,
    )
)


def images(count: int = len(CAPTIONS), seed: int = 0) -> list[bytes]:
    """Return PNG files of smooth colours, not square."""
    rng = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        corners = Image.fromarray(rng.integers(0, 256, (2, 3, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        corners.resize((24, 20), Image.Resampling.BICUBIC).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def write_data(directory: pathlib.Path, captions: tuple[str, ...] = CAPTIONS) -> pathlib.Path:
    """Write a folder with captions.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (data, caption) in enumerate(zip(images(len(captions)), captions, strict=True)):
        (directory / f"{i:03d}.png").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "caption": caption}))
    (directory / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@functools.cache
def data() -> pathlib.Path:
    """Return the folder, written once a test session."""
    return write_data(scratch() / "images")


def scratch() -> pathlib.Path:
    """Return a directory for this test session."""
    path = tempfile.mkdtemp(prefix="blip3o-tiny-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return pathlib.Path(path)
