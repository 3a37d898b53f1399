"""Decide which rewards run because a run's directory names them, and which the user must name.

The directory of a run may come from anyone: its config.json can name any module to import, any
server to send the images to, any environment variable to read a token from and any file to read
weights from. The built-in rewards that read nothing except the images run if the directory names
them; all others only if the command line does.
"""

import shlex
from collections.abc import Sequence

from blip3o_jax.config import ConfigError, RewardConfig, UserError
from blip3o_jax.config.errors import escaped
from blip3o_jax.rl.rewards.registry import parsed

# Name -> options that name no file, address, variable or module. One that is not listed here is not
# trusted.
LOCAL = {
    "shapes": {"correct_weight"},
    "ocr": {"scoring", "min_side", "border", "detect", "min_confidence"},
    "geneval": {"detector", "scoring", "threshold", "counting_threshold", "max_objects"},
}


def is_local(config: RewardConfig) -> bool:
    """Return whether a reward reads only images, prompts and metadata."""
    options = dict(config.options)
    if options.get("detector", "shapes") != "shapes":
        return False
    return (
        config.name in LOCAL
        and len(options) == len(config.options)
        and set(options) <= LOCAL[config.name]
    )


def check_trusted(rewards: Sequence[RewardConfig], where: str) -> None:
    """Refuse rewards of a run's own config.json, `where`, that are not local: one line with the
    flags that name them all."""
    foreign = [config for config in rewards if not is_local(config)]
    if not foreign:
        return
    arguments = [_argument(config) for config in rewards]
    if None in arguments:
        flags = "--reward=NAME,OPTION=VALUE for each (config.json holds what no flag can say)"
    else:
        flags = " ".join(shlex.quote(f"--reward={argument}") for argument in arguments)
    name = escaped(foreign[0].name)
    raise UserError(
        f"{where} names the reward {name[:100]}, which may run code, read files or connect "
        "elsewhere: a run's directory "
        f"does not decide that; if you trust it, repeat the command with {flags}"
    )


def _argument(config: RewardConfig) -> str | None:
    """Return the text that `registry.parsed` reads as `config`.

    Returns None if there is no such text, or if it is not printable.
    """
    pieces = [config.name, *(f"{option}={value}" for option, value in config.options)]
    pieces += [f"weight={config.weight!r}"] if config.weight != 1 else []
    pieces += ["clip={!r}:{!r}".format(*config.clip)] if config.clip else []
    text = ",".join(pieces)
    try:
        same = parsed(text) == config
    except ConfigError:
        same = False
    return text if same and text.isprintable() else None
