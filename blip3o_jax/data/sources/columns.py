"""Map columns of parquet files and features of TFDS data sets to the fields of a record."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.data.record import CAPTION_FIELDS, INPUT_FIELDS, TEXT_FIELDS

KEY_COLUMNS = ("key", "id", "__key__")

FIELDS = ("task", "image", *INPUT_FIELDS, *TEXT_FIELDS, "answer")


def known_fields(names: Iterable[str], where: str, kind: str) -> list[str]:
    """Return those of `names` that are fields of a record. Raises UserError if required ones are
    missing.
    """
    names = list(names)
    twice = [name for name in (*KEY_COLUMNS, *FIELDS) if names.count(name) > 1]
    if twice:
        hint = "rename or drop the one that is not meant"
        raise UserError(f"{where}: the name {twice[0]} is there twice among the {kind}: {hint}")
    known = [name for name in FIELDS if name in names]
    if not {"image", *INPUT_FIELDS} & set(known) or not {"task", *TEXT_FIELDS} & set(known):
        raise UserError(
            f"{where}: needs the {kind} image and {' or '.join(CAPTION_FIELDS)}; it has"
            f" {', '.join(names)}"
        )
    return known


def input_images(fields: Mapping[str, Any]) -> list[Any]:
    """Return the reference images. Empty ones are left out: TFDS has no missing values. TFDS gives
    several images as an array.
    """
    for given in map(fields.get, INPUT_FIELDS):
        images = (
            []
            if given is None
            else list(given)
            if isinstance(given, list | tuple | np.ndarray)
            else [given]
        )
        if any(images):
            return images
    return []
