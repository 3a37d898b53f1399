"""Run `blip3o reconstruct`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.sampling import sample_to_directory


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "reconstruct",
        run,
        "reconstruct images from their tokens",
        "Shows what the tokens and the model preserve of an image.",
    )
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--image",
        type=arguments.path,
        action="append",
        required=True,
        help="repeat it for more images",
    )
    flags.add_sampling(parser, from_images=True)


def run(args: argparse.Namespace) -> None:
    sample_to_directory(args, [("reconstruct", "", (path,)) for path in args.image])
