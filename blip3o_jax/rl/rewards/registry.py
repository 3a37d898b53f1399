"""Create rewards by name.

A module is imported when its reward is created, so that a run loads only the libraries it uses.

`python:PACKAGE.MODULE.FUNCTION` names a user's function of (uint8 images [B, H, W, 3], prompts,
metadata) that returns B numbers or a `Scores`. It takes the options as keyword arguments, as text.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import ConfigError, RewardConfig
from blip3o_jax.config.errors import did_you_mean, type_and_line
from blip3o_jax.rl.rewards.reward import Reward, Scores

# name -> "module:factory". A factory takes the options as keyword arguments, as text.
REWARDS = {
    name: f"blip3o_jax.rl.rewards.{module}:create"
    for name, module in {
        "ocr": "ocr",
        "geneval": "geneval",
        "shapes": "shapes",
        "clip": "clip",
        "siglip": "clip",
        "http": "http",
    }.items()
}
USER = "python:"


def parsed(text: str) -> RewardConfig:
    """Parse a reward as a command line names it, its options after commas:
    "geneval,detector=transformers,path=DIR". A piece without "=" goes on with the value before it:
    "http,urls=http://a:8000,http://b:8000". `weight=0.5` and `clip=0:1` are those of the term in
    the sum. ConfigError for what is none of these.
    """
    name, *pieces = text.split(",")
    pairs: list[tuple[str, str]] = []
    for piece in pieces:
        option, equals, value = piece.partition("=")
        if equals:
            pairs.append((option, value))
        elif pairs:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]},{piece}")
        else:
            raise ConfigError(
                f"reward {text!r}: {piece!r} is no option: write NAME,OPTION=VALUE,..."
            )
    term = {
        "weight": _numbers(text, pairs, "weight", 1, (1.0,))[0],
        "clip": _numbers(text, pairs, "clip", 2, None),
    }
    return RewardConfig(
        name=name, options=tuple(pair for pair in pairs if pair[0] not in term), **term
    )


def _numbers(text: str, pairs: list[tuple[str, str]], field: str, count: int, default: Any) -> Any:
    """Parse `count` numbers, "0:1", of a field of the term; return the default for no text.
    ConfigError for other text."""
    found = [value for option, value in pairs if option == field]
    try:
        numbers = tuple(float(number) for number in found[-1].split(":")) if found else default
    except ValueError:
        numbers = ()
    if found and (len(numbers) != count or not all(map(math.isfinite, numbers))):
        raise ConfigError(
            f"reward {text!r}: {field}={found[-1]!r} must be "
            f"{'LOW:HIGH' if count == 2 else 'a number'}"
        )
    return numbers


def make(config: RewardConfig) -> Reward:
    """Create the reward that `config` names, with its options.

    Raises ConfigError for an unknown name or option.
    """
    options = dict(config.options)
    if config.name.startswith(USER):
        function = _user_function(config.name)
        _check_options(config.name, options, _parameters(function)[3:])
        _check_call(config.name, function, options)
        return UserReward(config.name, functools.partial(function, **options))
    check_name(config.name)
    module, factory = REWARDS[config.name].split(":")
    create = getattr(importlib.import_module(module), factory)
    _check_options(config.name, options, _parameters(create))
    return create(**options)


def check_name(name: str) -> None:
    """Raise ConfigError unless a reward has this name. It imports nothing; whether a user's
    function exists, `make` finds out.
    """
    if name not in REWARDS and not name.startswith(USER):
        raise ConfigError(
            f"unknown reward {name!r}: {_nearest(name, [*REWARDS, USER + 'MODULE.FUNCTION'])}"
        )


class UserReward(Reward):
    """Wrap a user's function as a reward."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function = name, function

    def __call__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        found = self.function(images_BHWC, prompts, metadata)
        return found if isinstance(found, Scores) else Scores(np.asarray(found, np.float32))


def _user_function(name: str) -> Callable[..., Any]:
    path = name.removeprefix(USER)
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ConfigError(f"reward {name!r} must be {USER}MODULE.FUNCTION")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except ImportError as e:
        raise ConfigError(
            f"reward {name!r}: module {module} cannot be imported ({e}); is its folder in "
            "PYTHONPATH?"
        ) from e
    except Exception as e:  # of the user's own code
        raise ConfigError(
            f"reward {name!r}: module {module} fails when it is imported: {type_and_line(e)}"
        ) from e
    if not callable(function):
        raise ConfigError(f"reward {name!r}: module {module} has no function {attribute}")
    return function


def _check_call(name: str, function: Callable[..., Any], options: Mapping[str, str]) -> None:
    try:
        inspect.signature(function).bind([], [], [], **options)
    except TypeError as e:
        raise ConfigError(
            f"reward {name} cannot be called with (images, prompts, metadata): {e}"
        ) from e


def _check_options(
    name: str, options: Mapping[str, str], parameters: Sequence[inspect.Parameter]
) -> None:
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ConfigError(f"reward {name} needs its option {parameter.name}")
    known = [p.name for p in named]
    for option in options:
        if option not in known and named == parameters:
            raise ConfigError(f"reward {name} has no option {option!r}: {_nearest(option, known)}")


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError as e:  # some that are written in C
        raise ConfigError(
            f"reward: {e}; wrap it in a function of (images, prompts, metadata)"
        ) from e


def _nearest(wrong: str, known: Sequence[str]) -> str:
    return did_you_mean(wrong, known) or f"there is {', '.join(known) or 'none'}"
