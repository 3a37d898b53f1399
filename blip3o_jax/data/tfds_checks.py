"""Check a TFDS data set before TFDS reads it, since it may come from an untrusted source.

TFDS imports the module of every class that features.json names, and opens every file that the
templates of dataset_info.json lead to.
"""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from blip3o_jax import files
from blip3o_jax.config import UserError
from blip3o_jax.data.record import one_line

# "type" is that of TFDS before 4.6.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_JSON_KEYS = ("json", "content")  # JSON within a string
_OWN = "tensorflow_datasets."


def check_description(directory: str) -> None:
    """Raise UserError unless features.json names classes of TFDS alone."""
    path = os.path.join(directory, "features.json")
    try:
        files.check_regular(os.path.join(directory, "dataset_info.json"))
        files.check_regular(path)
        with open(path, "rb") as file:
            names = list(_class_names(json.load(file)))
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}: fetch it again") from None
    except RecursionError:
        raise UserError(f"{path}: broken JSON: too many brackets within each other") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: broken JSON: {str(error).partition(';')[0]}") from None
    for name in names:
        if not name.startswith(_OWN):
            hint = "write the data set again with features of tfds.features"
            raise UserError(f"{path}: the class {one_line(name)} is not one of {_OWN}*: {hint}")


def _class_names(value: Any) -> Iterator[str]:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(inner, str):
                    pending.append(inner)
                elif key in _CLASS_KEYS:
                    yield inner
                elif key in _JSON_KEYS:
                    pending.append(json.loads(inner))


def check_inside(directory: str, shards: Iterable[str]) -> None:
    """Raise UserError where a shard is outside of the data set, symbolic links resolved."""
    root = os.path.realpath(directory)
    for shard in shards:
        try:
            path = os.path.realpath(shard)
        except ValueError:  # a NUL
            raise UserError(f"{directory}: no file can be called {one_line(shard)}") from None
        if os.path.commonpath([root, path]) != root:
            reason = f"the shard {one_line(shard)} leads out of the data set, to {one_line(path)}"
            raise UserError(f"{directory}: {reason}: copy it in, and mend dataset_info.json")
