"""Run `blip3o params`."""

import argparse
from typing import Any

from blip3o_jax.cli import flags, settings
from blip3o_jax.cli.command import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "params",
        run,
        "print the parameters of each part of a model",
        "Builds the model abstractly: the largest sizes answer on a laptop.",
    )
    flags.add_config(parser)


def run(args: argparse.Namespace) -> None:
    config = settings.load(args)
    from blip3o_jax import model_table

    model_table.print_table(config)
