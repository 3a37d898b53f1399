"""Bodies of a reward server's requests and answers. JSON with base64 PNG images: nothing that is executed when it is read.

    POST /score   {"prompts": [text, ...], "metadata": [{...}, ...], "images": [base64 of a PNG, ...]}
    answer        {"total": [number, ...], "parts": {name: [number, ...]}}, or {"error": one line}

Shape suffixes: B images, H height, W width, C colour channels.
"""

import base64
import binascii
import dataclasses
import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards.reward import Scores

MAX_VALUES = 1 << 18  # JSON values of a request; each takes many times its length once it is read
_LARGEST = float(np.finfo(np.float32).max)
_PNG = b"\x89PNG\r\n\x1a\n"


class Refused(Exception):
    """A request that gets `status` and one line instead of scores."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status, self.line = status, line


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be scored; images still as PNG files, of `pixels` pixels altogether by their headers."""

    prompts: list[str]
    metadata: list[dict[str, Any]]
    files: list[bytes]
    pixels: int


def encode_request(images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> bytes:
    """Images are uint8 RGB. ValueError or TypeError for metadata that JSON cannot hold."""
    images = []
    for image_HWC in images_BHWC:
        file = io.BytesIO()
        Image.fromarray(image_HWC).save(file, "PNG", compress_level=1)
        images.append(base64.b64encode(file.getvalue()).decode("ascii"))
    body = {"prompts": list(prompts), "metadata": [dict(m) for m in metadata], "images": images}
    return json.dumps(body, allow_nan=False).encode("utf-8")


def parse_request(body: bytes, max_pixels: int) -> Request:
    """Judges everything but what is inside the images. Refused with 400 (no JSON, no PNG), 413 (too many values or pixels)
    or 422 (wrong fields)."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Refused(413, f"the body holds more than {MAX_VALUES} values: send fewer images at once")
    fields = _fields(body)
    prompts, metadata, images = (fields[name] for name in ("prompts", "metadata", "images"))
    if not prompts or not len(prompts) == len(metadata) == len(images):
        raise Refused(422, f"{len(prompts)} prompts, {len(metadata)} metadata and {len(images)} images: send as many of each")
    files, pixels = [], 0
    for index, image in enumerate(images):
        try:
            files.append(base64.b64decode(image, validate=True))
        except (binascii.Error, ValueError):
            raise Refused(400, f"images[{index}] is not base64") from None
        pixels += _pixels(files[-1], index)
        if pixels > max_pixels:
            raise Refused(413, f"the images have more than {max_pixels} pixels altogether: send fewer or smaller ones")
    return Request(prompts, metadata, files, pixels)


def _fields(body: bytes) -> dict[str, list]:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {str(error).splitlines()[0]}") from None
    kinds = {"prompts": str, "metadata": dict, "images": str}
    if not isinstance(fields, dict) or set(fields) != set(kinds):
        raise Refused(422, f"the body must be an object with {', '.join(kinds)} and nothing else")
    for name, kind in kinds.items():
        if not isinstance(fields[name], list) or not all(isinstance(value, kind) for value in fields[name]):
            raise Refused(422, f"{name} must be a list of {'objects' if kind is dict else 'texts'}")
    return fields


def _pixels(file: bytes, index: int) -> int:
    """Of a PNG, by its header: what it will take up once it is decoded."""
    if len(file) < 33 or file[:8] != _PNG or file[12:16] != b"IHDR":
        raise Refused(400, f"images[{index}] is not a PNG")
    width, height = struct.unpack(">II", file[16:24])
    return width * height


def decode_image(file: bytes, index: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a PNG; Refused (400) if it is broken."""
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds on a broken file
        raise Refused(
            400, f"images[{index}] is a broken PNG: {str(error).splitlines()[0] if str(error) else 'no reason'}"
        ) from None


def encode_scores(scores: Scores) -> bytes:
    parts = {name: np.asarray(values_B).tolist() for name, values_B in scores.parts.items()}
    return json.dumps({"total": np.asarray(scores.total_B).tolist(), "parts": parts}, allow_nan=False).encode("utf-8")


def decode_scores(body: bytes, count: int) -> Scores:
    """ValueError unless the body holds `count` finite numbers, and as many in each part."""
    fields = json.loads(body.decode("utf-8"))
    if not isinstance(fields, dict) or not isinstance(fields.get("parts"), dict):
        raise ValueError("the answer has no 'total' and 'parts'")
    arrays = {name: _floats(values, name, count) for name, values in fields["parts"].items()}
    return Scores(_floats(fields.get("total"), "total", count), arrays)


def _floats(values: Any, name: str, count: int) -> np.ndarray:
    if not isinstance(values, list) or len(values) != count or not all(type(v) in (int, float) for v in values):
        raise ValueError(f"{name} is not a list of {count} numbers")
    if not all(abs(value) <= _LARGEST for value in values):  # nor is NaN
        raise ValueError(f"{name} holds a number that is not finite")
    return np.array(values, np.float32)


def read_token(variable: str) -> str:
    """The token in an environment variable, or a UserError."""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"token_env={variable}: that environment variable is not set; export it, or leave the option out")
    return token
