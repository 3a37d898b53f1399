"""Rewards by name. A module is imported where its reward is made, so that a run loads the libraries of those that it uses.

`python:PACKAGE.MODULE.FUNCTION` names a user's own: a function of (uint8 images [B, H, W, 3], prompts, metadata) that returns
B numbers or a `Scores`. It takes the options as keyword arguments, as text.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import ConfigError, RewardConfig
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
    """A reward as a command line names it, its options after commas: "geneval,detector=transformers,path=DIR"."""
    name, *options = text.split(",")
    pairs = tuple(tuple(option.split("=", 1)) for option in options)
    if wrong := [option for option, pair in zip(options, pairs, strict=True) if len(pair) != 2]:
        raise ConfigError(f"reward {text!r}: {wrong[0]!r} is no option: write NAME,OPTION=VALUE,...")
    return RewardConfig(name=name, options=pairs)


def make(config: RewardConfig) -> Reward:
    """The reward that `config` names, with its options. ConfigError for a name or an option that there is not."""
    options = dict(config.options)
    if config.name.startswith(USER):
        function = _user_function(config.name)
        _check_options(config.name, options, _parameters(function)[3:])
        return UserReward(config.name, functools.partial(function, **options))
    if config.name not in REWARDS:
        raise ConfigError(f"unknown reward {config.name!r}: {_nearest(config.name, [*REWARDS, USER + 'MODULE.FUNCTION'])}")
    module, factory = REWARDS[config.name].split(":")
    create = getattr(importlib.import_module(module), factory)
    _check_options(config.name, options, _parameters(create))
    return create(**options)


class UserReward(Reward):
    """A user's function as a reward."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function = name, function

    def __call__(self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
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
        raise ConfigError(f"reward {name!r}: module {module} cannot be imported ({e}); is its folder in PYTHONPATH?") from e
    if not callable(function):
        raise ConfigError(f"reward {name!r}: module {module} has no function {attribute}")
    return function


def _check_options(name: str, options: Mapping[str, str], parameters: Sequence[inspect.Parameter]) -> None:
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ConfigError(f"reward {name} needs its option {parameter.name}")
    known = [p.name for p in named]
    for option in options:
        if option not in known and named == parameters:
            raise ConfigError(f"reward {name} has no option {option!r}: {_nearest(option, known)}")


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _nearest(wrong: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there is {', '.join(known) or 'none'}"
