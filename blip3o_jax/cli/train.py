"""Run `blip3o train`."""

import argparse
from pathlib import Path
from typing import Any

from blip3o_jax.cli import flags, settings
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.multihost import on_all_hosts


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        run,
        "train what a config file says: one stage, or several in order",
        "Resumes from the last checkpoint in the working directory; stages that are finished are"
        " not run again.",
        again="the same command resumes from the last checkpoint in its --workdir",
    )
    flags.add_config(parser)
    flags.add_workdir(parser)
    flags.add_hosts(parser)
    parser.set_defaults(stops_on_sigterm=True)


def run(args: argparse.Namespace) -> int:
    stages = settings.load_recipe(args)

    def job(workdir: Path) -> None:
        from blip3o_jax.train import recipe

        recipe.run(stages, workdir)

    return on_all_hosts(args, stages, job)
