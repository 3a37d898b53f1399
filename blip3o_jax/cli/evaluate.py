"""Run `blip3o evaluate`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command
from blip3o_jax.config.types import INT32


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        run,
        "score a checkpoint on held-out prompts",
        "Writes scores.json, per category and overall, and the images that were scored. shapes,"
        " shapes_edit, shapes_qa and reconstruct have held-out prompts of their own; any reward of"
        " docs/rl.md (ocr, geneval,detector=transformers,path=DIR) is a suite for a file of"
        " prompts.",
    )
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--suite",
        type=arguments.word,
        required=True,
        metavar="NAME[,OPTION=VALUE]",
        help="a suite with its own prompts, or a reward and its options",
    )
    parser.add_argument(
        "--prompts_file",
        type=arguments.path,
        metavar="FILE",
        help="prompts for a reward, as rl.prompts_file",
    )
    parser.add_argument(
        "--images_per_prompt",
        type=arguments.integer(1, 2**16),
        default=1,
        metavar="N",
        help="images per prompt for a reward (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where scores and images are written",
    )
    parser.add_argument(
        "--num_prompts",
        type=arguments.integer(1, INT32),
        metavar="N",
        help="number of prompts (300 of a suite, all of a file)",
    )
    parser.add_argument("--seed", type=flags.SEED, default=0, help="(%(default)s)")
    parser.add_argument(
        "--batch_size",
        type=flags.sampling("batch_size"),
        metavar="N",
        help="prompts sampled at once (the checkpoint's config)",
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.evaluation import runner

    runner.evaluate(
        args.checkpoint,
        args.suite,
        args.out,
        num_prompts=args.num_prompts,
        seed=args.seed,
        prompts_file=args.prompts_file,
        images_per_prompt=args.images_per_prompt,
        batch_size=args.batch_size,
    )
