"""Parse options of rewards, which a config or a command line gives as text; UserError names the
option."""

from collections.abc import Sequence
from typing import TypeVar

from blip3o_jax.config import UserError
from blip3o_jax.config.errors import not_a_choice

Number = TypeVar("Number", int, float)


def choice(reward: str, option: str, text: str, choices: Sequence[str]) -> str:
    """Return `text` if it is one of `choices`. UserError otherwise."""
    if text not in choices:
        raise UserError(f"reward {reward}: {option}={text!r} {not_a_choice(text, choices)}")
    return text


def flag(reward: str, option: str, text: str) -> bool:
    """Parse `text` as a boolean. UserError for other text."""
    return choice(reward, option, text.lower(), ("true", "false")) == "true"


def number(
    reward: str, option: str, text: str, kind: type[Number], lowest: Number, highest: Number
) -> Number:
    """Parse `text` as an int or a float in lowest .. highest."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not lowest <= value <= highest:
        names = {int: "a whole number", float: "a number"}
        raise UserError(
            f"reward {reward}: {option}={text!r} must be {names[kind]} in {lowest} .. {highest}"
        )
    return value
