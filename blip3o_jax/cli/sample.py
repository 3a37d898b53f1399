"""Run `blip3o sample`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.sampling import sample_to_directory


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "sample",
        run,
        "draw images for prompts",
        "Writes one PNG a prompt and a labelled grid. The same prompt and seed give the same image"
        " at any batch size.",
    )
    flags.add_checkpoint(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        type=arguments.word,
        action="append",
        metavar="TEXT",
        help="what to draw; repeat it for more images",
    )
    prompts.add_argument(
        "--prompts_file",
        type=arguments.path,
        metavar="FILE",
        help="one prompt a line, or JSON lines",
    )
    flags.add_sampling(parser, from_images=False)


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.data.prompts import read_prompts

    prompts = args.prompt or [prompt.text for prompt in read_prompts(args.prompts_file)]
    sample_to_directory(args, [("t2i", prompt, ()) for prompt in prompts])
