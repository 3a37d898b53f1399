"""Run `blip3o data shapes`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command

_RECORDS = arguments.integer(1, 10**8)


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "shapes",
        run,
        "render the embedded compositional data set",
        "Scenes of coloured shapes with captions, written as ArrayRecord files. The test split"
        " holds combinations that the training split never shows.",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where the data set is written",
    )
    parser.add_argument(
        "--num_train",
        type=_RECORDS,
        default=20000,
        metavar="N",
        help="training scenes (%(default)s)",
    )
    parser.add_argument(
        "--num_validation",
        type=_RECORDS,
        default=500,
        metavar="N",
        help="validation scenes (%(default)s)",
    )
    parser.add_argument(
        "--num_test", type=_RECORDS, default=2000, metavar="N", help="held-out scenes (%(default)s)"
    )
    parser.add_argument(
        "--num_edits",
        type=arguments.integer(0, 10**8),
        default=0,
        metavar="N",
        help="training edits, in a tar file (%(default)s)",
    )
    parser.add_argument(
        "--num_questions",
        type=arguments.integer(0, 10**8),
        default=0,
        metavar="N",
        help="training questions (%(default)s)",
    )
    parser.add_argument(
        "--image_size",
        type=arguments.integer(32, 4096),
        default=64,
        metavar="PIXELS",
        help="side of an image (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=flags.SEED,
        default=0,
        help="the same seed gives the same scenes (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.data.shapes import builder

    directory = builder.prepare(
        args.out,
        num_train=args.num_train,
        num_validation=args.num_validation,
        num_test=args.num_test,
        image_size=args.image_size,
        seed=args.seed,
    )
    if args.num_edits or args.num_questions:
        from blip3o_jax.data.shapes import tasks

        counts = {"num_edits": args.num_edits, "num_questions": args.num_questions}
        tasks.prepare(directory, **counts, image_size=args.image_size, seed=args.seed)
