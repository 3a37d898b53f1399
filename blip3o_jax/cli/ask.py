"""Run `blip3o ask`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "ask",
        run,
        "answer a question about an image",
        "Prints the answer. For a checkpoint that was trained with reference images"
        " (model.editing).",
    )
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--image",
        type=arguments.path,
        action="append",
        required=True,
        help="repeat it for a question about several",
    )
    parser.add_argument("--question", type=arguments.word, required=True, metavar="TEXT")
    parser.add_argument(
        "--temperature",
        type=flags.sampling("temperature"),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest words (%(default)s)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=arguments.integer(1, 2**20),
        default=64,
        metavar="N",
        help="maximum number of tokens of an answer (%(default)s)",
    )
    parser.add_argument("--seed", type=flags.SEED, default=0, help="(%(default)s)")


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.data import images

    shown = [images.load(path) for path in args.image]
    from blip3o_jax import pipeline

    model = pipeline.load(args.checkpoint)
    settings = {
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "batch_size": 1,
    }
    print(*model.ask([shown], [args.question], **settings))
