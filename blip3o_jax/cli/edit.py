"""Run `blip3o edit`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.sampling import sample_to_directory


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "edit",
        run,
        "edit an image by an instruction",
        "For a checkpoint that was trained with reference images (model.editing).",
    )
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--image",
        type=arguments.path,
        action="append",
        required=True,
        help="image to edit; repeat it for several reference images",
    )
    parser.add_argument(
        "--instruction",
        type=arguments.word,
        required=True,
        metavar="TEXT",
        help="the edit, in words",
    )
    flags.add_sampling(parser, from_images=True)


def run(args: argparse.Namespace) -> None:
    sample_to_directory(args, [("edit", args.instruction, tuple(args.image))])
