"""Define the types of command-line flags; their bounds come from the annotations of the settings
(config/fields.py).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from blip3o_jax.config import errors, fields, types
from blip3o_jax.config.constraints import Bounds

# (kind of number, as a message names it)
_NAMES = {int: "a whole number", float: "a number"}

Argument = Callable[[str], Any]


def number(hint: Any) -> Argument:
    """Return the argparse type of a number whose annotation is `hint`."""
    kind = fields.unwrapped(hint)[0]

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{errors.shown(text)} is not {_NAMES[kind]}"
            ) from None
        return _accepted(value, hint, text)

    return read


def integer(low: int, high: int) -> Argument:
    """Return the argparse type of a whole number in low .. high."""
    return number(Annotated[int, Bounds(low, high)])


def field(cls: type, name: str) -> Argument:
    """Return the argparse type of a flag that sets the number `name` of the group `cls`."""
    return number(fields.field_types(cls)[name])


def text(value: str) -> str:
    """Return text that UTF-8 can hold."""
    return _accepted(value, types.Text, value)


def word(value: str) -> str:
    """Return text that is not empty: a name, a prompt."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty: give one")
    return text(value)


def path(value: str) -> Path:
    """Return a path of this machine's file system.

    An empty one would be the current directory, and a URL a directory of that name.
    """
    if not value.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    _accepted(value, types.Path, value)
    if "://" in value:
        raise argparse.ArgumentTypeError(
            f"{errors.shown(value)} is no directory: mount the bucket, as docs/pods.md says, and"
            " give the path"
        )
    return Path(value)


def config_path(value: str) -> str:
    """Return FILE.py[:ARG] of --config."""
    return str(_accepted(value, types.Path, value))


def names(value: str) -> tuple[str, ...]:
    """Return the names of a list with commas between; one at least."""
    found = tuple(name.strip() for name in text(value).split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError(
            f"{errors.shown(value)} names nothing: leave the flag out for all"
        )
    return found


def address(value: str) -> str:
    """Return HOST:PORT."""
    host, _, port = _accepted(value, types.Text, value).rpartition(":")
    # isdigit alone accepts superscripts, which int() refuses.
    if not (port.isascii() and port.isdigit()):
        # `distributed.Launch` names the flag in the same words.
        raise argparse.ArgumentTypeError(
            f"{errors.shown(value)} names no port: give it as HOST:PORT"
        )
    if not host or len(port) > 5 or not 0 < int(port) < 2**16:
        raise argparse.ArgumentTypeError(
            f"{errors.shown(value)} is not HOST:PORT with a port in 1 .. 65535"
        )
    return value


def size(value: str) -> tuple[int, int]:
    """Return (height, width) of HEIGHTxWIDTH."""
    sides = value.split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise argparse.ArgumentTypeError(
            f"{errors.shown(value)} is not HEIGHTxWIDTH in pixels, as in 768x1152"
        )
    side = number(types.Side)
    return side(sides[0]), side(sides[1])


def _accepted(value: Any, hint: Any, given: str) -> Any:
    """Return `value` unless a constraint of the annotation refuses it; argparse adds the flag's
    name to the reason.
    """
    for constraint in fields.unwrapped(hint)[1]:
        if why := constraint.refusal(value):
            raise argparse.ArgumentTypeError(f"{errors.shown(given)} {why}")
    return value
