"""Check requests to a reward server (`wire`) before anything is decoded."""

import base64
import binascii
import dataclasses
import json
import os
from typing import Any

import numpy as np

from blip3o_jax.config.errors import first_line
from blip3o_jax.rl.rewards import png
from blip3o_jax.rl.rewards.png import Png
from blip3o_jax.serving.refused import Refused

MAX_VALUES = 1 << 18  # JSON values of a request; each takes many times its length once it is read
VALUE_BYTES = 256  # that one of them may take
# Bytes of memory for each byte of a body while it is parsed: the body as sent and as received (2),
# the decoded text and its strings of 4 bytes a character (8), the files, the rebuilt files, and
# their copies that are sent back (3).
PARSE_BYTES = 13
MAX_IMAGES = 1024  # of a request


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """Hold the images to score, with their prompts. `metadata`: JSON texts, since parsed objects
    take many times the memory while a request waits."""

    prompts: list[str]
    metadata: list[bytes]
    images: list[Png]


def start() -> None:
    """Initialise a parsing process."""
    os.nice(10)  # the server has priority: it answers all clients


def parse_array(body: np.ndarray, max_pixels: int) -> ScoreRequest:
    """Parse uint8 [bytes] as `parse_request` does: processes are sent arrays without a copy."""
    return parse_request(bytearray(body), max_pixels)


def parse_request(body: bytes | bytearray, max_pixels: int) -> ScoreRequest:
    """Return what is to be scored, its images parsed but not decoded. Refused with 400 (no JSON, no
    sound PNG), 413 (too many values, images or pixels) or 422 (wrong fields)."""
    # An upper bound without parsing: one of these characters precedes every value but the first.
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Refused(
            413, f"the body holds more than {MAX_VALUES} values: send fewer images at once"
        )
    fields = _fields(body)
    prompts, metadata, files = (fields[name] for name in ("prompts", "metadata", "images"))
    if not prompts or not len(prompts) == len(metadata) == len(files):
        raise Refused(
            422,
            f"{len(prompts)} prompts, {len(metadata)} metadata and {len(files)} images: send as "
            "many of each",
        )
    if len(files) > MAX_IMAGES:
        raise Refused(413, f"the body holds more than {MAX_IMAGES} images: send fewer at once")
    for index, prompt in enumerate(prompts):
        if not _is_unicode(prompt):
            raise Refused(422, f"prompts[{index}] holds half a surrogate pair, which is no text")
    images: list[Png] = []
    left = max_pixels
    # Popped from the end, in order: a list's front is expensive to remove.
    files.reverse()
    while files:  # each text is freed once its file is decoded
        images.append(_image(files.pop(), len(images), left, max_pixels))
        left -= images[-1].pixels
    return ScoreRequest(
        prompts, [_json(fields, index) for index, fields in enumerate(metadata)], images
    )


def _fields(body: bytes | bytearray) -> dict[str, list]:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {first_line(error)}") from None
    kinds = {"prompts": str, "metadata": dict, "images": str}
    if not isinstance(fields, dict) or set(fields) != set(kinds):
        raise Refused(422, f"the body must be an object with {', '.join(kinds)} and nothing else")
    for name, kind in kinds.items():
        if not isinstance(fields[name], list) or not all(
            isinstance(value, kind) for value in fields[name]
        ):
            raise Refused(422, f"{name} must be a list of {'objects' if kind is dict else 'texts'}")
    return fields


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json(metadata: dict[str, Any], index: int) -> bytes:
    try:
        return json.dumps(metadata, allow_nan=False).encode("ascii")
    except (ValueError, RecursionError) as error:  # a number such as 1e999, deep nesting
        raise Refused(400, f"metadata[{index}] is not JSON: {error}") from None


def _image(text: str, index: int, left: int, max_pixels: int) -> Png:
    """Return an image of at most `left` pixels."""
    try:
        image = png.parse(base64.b64decode(text, validate=True))
    except png.BadPng as error:
        raise Refused(400, f"images[{index}] {error}") from None
    except (binascii.Error, ValueError):
        raise Refused(400, f"images[{index}] is not base64") from None
    if image.pixels > left:
        raise Refused(
            413,
            f"the images have more than {max_pixels} pixels altogether: send fewer or smaller ones",
        )
    return image
