"""Read the config of a command, for all commands that take --config."""

import argparse

from blip3o_jax.config import Config


def load_recipe(args: argparse.Namespace) -> dict[str, Config]:
    """Return the configs of --config by name, with the overrides of the command line; what
    `check_names` refuses is refused in all of them before any work.
    """
    from blip3o_jax.config import loader

    recipe = loader.load_recipe(args.config, args.overrides)
    for config in recipe.values():
        check_names(config)
    return recipe


def load(args: argparse.Namespace) -> Config:
    """Return the one config of --config (of a recipe, its last); see `load_recipe`."""
    return list(load_recipe(args).values())[-1]


def check_names(config: Config) -> None:
    """Raise ConfigError for names whose choices the config package does not know: the optimizer and
    its schedule, with their arguments, the policy and the rewards. It asks for no devices.
    """
    # Late: they import jax, which --help does not wait for.
    from blip3o_jax.rl.registry import check_policy
    from blip3o_jax.rl.rewards.registry import check_name
    from blip3o_jax.train.optimizer import check_arguments

    check_arguments(config.optimizer)
    check_policy(config.rl.policy)
    for reward in config.rl.rewards:
        check_name(reward.name)
