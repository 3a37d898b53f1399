"""Run `blip3o convert verify`."""

import argparse
from typing import Any

from blip3o_jax import files
from blip3o_jax.cli import arguments
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.convert_source import add_source
from blip3o_jax.config.types import UINT32


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        run,
        "compare a PyTorch directory with a checkpoint, weights and outputs",
        "Runs both sides in float32 on the same seeded inputs; needs PyTorch (the extra [convert])."
        " Ends with status 1 where they differ, naming the tensor and the first layer.",
    )
    add_source(parser, "--torch")
    parser.add_argument(
        "--jax",
        type=arguments.path,
        required=True,
        metavar="CKPT",
        help="a working directory or checkpoint",
    )
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE.json", help="file for the numbers, as JSON"
    )
    parser.set_defaults(out_is_file=True)
    parser.add_argument(
        "--parts",
        type=arguments.names,
        default=(),
        metavar="NAMES",
        help="some of the parts only (all)",
    )
    parser.add_argument("--ema", action="store_true", help="compare the averaged weights")
    parser.add_argument(
        "--seed",
        type=arguments.integer(0, UINT32),
        default=0,
        help="seed of the inputs (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from blip3o_jax.convert.report import print_report
    from blip3o_jax.convert.verify import verify

    report = verify(
        args.torch,
        args.jax,
        diffusion=args.diffusion,
        ta_tok=args.ta_tok,
        ta_tok_config=args.ta_tok_config,
        initialise=args.initialise,
        variant=args.variant,
        ema=args.ema,
        parts=args.parts,
        seed=args.seed,
    )
    print_report(report)
    if args.out:
        files.write_json(args.out, report.to_dict())
    return 0 if report.ok else 1
