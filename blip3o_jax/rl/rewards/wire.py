"""Encode and decode the bodies of a reward server's requests and answers, except reading requests
(`requests`): JSON with base64 PNG images, so that no code is executed.

    POST /score   {"prompts": [text, ...], "metadata": [{...}, ...],
                   "images": [base64 of a PNG, ...]}
    answer        {"total": [number, ...], "parts": {name: [number, ...]}}, or {"error": one line}

Shape suffixes: B images, H height, W width, C colour channels.
"""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards.reward import Scores

MAX_PARTS = 64  # of an answer
MAX_NAME = 100  # characters of a part's name
_LARGEST = float(np.finfo(np.float32).max)


def largest_answer(count: int) -> int:
    """Return the bytes that scores of `count` images may take."""
    return (MAX_PARTS + 1) * (MAX_NAME * 6 + 32 * count) + 4096


def encode_request(
    images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> bytes:
    """Encode uint8 RGB images with prompts and metadata. ValueError or TypeError for metadata that
    JSON cannot represent."""
    images = []
    for image_HWC in images_BHWC:
        file = io.BytesIO()
        # Level 1: the time of encoding matters more than the size.
        Image.fromarray(image_HWC).save(file, "PNG", compress_level=1)
        images.append(base64.b64encode(file.getvalue()).decode("ascii"))
    body = {"prompts": list(prompts), "metadata": [dict(m) for m in metadata], "images": images}
    return json.dumps(body, allow_nan=False).encode("utf-8")


def encode_scores(scores: Scores) -> bytes:
    """Encode scores as the body of an answer."""
    parts = {name: np.asarray(values_B).tolist() for name, values_B in scores.parts.items()}
    return json.dumps(
        {"total": np.asarray(scores.total_B).tolist(), "parts": parts}, allow_nan=False
    ).encode("utf-8")


def decode_scores(body: bytes, count: int) -> Scores:
    """Return the scores in an answer. ValueError unless it holds `count` finite numbers, and as
    many in each part.
    """
    try:
        fields = json.loads(body.decode("utf-8"))
    except RecursionError:
        raise ValueError("the answer is JSON of too many levels") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("parts"), dict):
        raise ValueError("the answer has no 'total' and 'parts'")
    parts = fields["parts"]
    if len(parts) > MAX_PARTS or not all(
        len(name) <= MAX_NAME and name.isprintable() for name in parts
    ):
        raise ValueError(
            f"the answer has more than {MAX_PARTS} parts, or one whose name is no name"
        )
    arrays = {name: _floats(values, name, count) for name, values in parts.items()}
    return Scores(_floats(fields.get("total"), "total", count), arrays)


def _floats(values: Any, name: str, count: int) -> np.ndarray:
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(type(v) in (int, float) for v in values)
    ):
        raise ValueError(f"{name} is not a list of {count} numbers")
    # Compared as Python numbers, before float32 would make large ones infinite.
    if not all(abs(value) <= _LARGEST for value in values):  # nor is NaN
        raise ValueError(f"{name} holds a number that is not finite")
    return np.array([float(value) for value in values], np.float32)


def read_token(variable: str) -> str:
    """Return the token in an environment variable. UserError where there is none, or one that no
    header can hold.
    """
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"token_env={variable}: that environment variable is not set; export it, or leave the "
            "option out"
        )
    check_token(f"token_env={variable}", token)
    return token


def check_token(name: str, token: str) -> None:
    """Raise UserError for a token that an HTTP header cannot carry."""
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(
            f"{name}: a token is made of ASCII letters, digits and signs, without spaces"
        )
