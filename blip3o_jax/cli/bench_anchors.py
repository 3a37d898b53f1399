"""Run `blip3o bench anchors`."""

import argparse
import shlex
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "anchors",
        run,
        "the cost model of `bench sharding` against published training steps; needs no TPU",
        "Needs libtpu (the extra [tpu]). Compiles language models of published sizes for the chips"
        " of published measurements, and compares the predicted times with the measured ones;"
        " writes anchors.json.",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where the report is written",
    )
    parser.add_argument(
        "--only",
        type=arguments.names,
        default=(),
        metavar="LIST",
        help="names of anchors, with commas between (all)",
    )
    parser.add_argument(
        "--keep_hlo", action="store_true", help="write each compiled program's text there too"
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.bench.sharding import anchors

    typed = (
        [f"--out={args.out}"]
        + [f"--only={flags.format_value(args.only)}"] * bool(args.only)
        + ["--keep_hlo"] * args.keep_hlo
    )
    command = shlex.join(["blip3o", "bench", "anchors", *typed])
    anchors.print_report(anchors.bench(args.out, args.only, command, keep_hlo=args.keep_hlo))
