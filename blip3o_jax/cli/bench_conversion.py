"""Run `blip3o bench conversion`."""

import argparse
import shlex
import sys
from typing import Any

from blip3o_jax.cli import arguments, settings
from blip3o_jax.cli.command import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "conversion",
        run,
        "measure time and memory of importing and exporting weights",
        "Writes random weights of the config's sizes in the published layout, imports and exports"
        " them, compares the bits, and reads and writes the same files with the safetensors library"
        " (the extra [convert]). Needs disk space for four copies.",
    )
    parser.add_argument(
        "--config",
        type=arguments.config_path,
        required=True,
        metavar="FILE.py[:ARG]",
        help="a file under configs/, and its argument",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="for conversion.json, and the weights meanwhile",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="(%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.bench import conversion

    model = settings.load(args).model
    command = shlex.join(["blip3o", *sys.argv[1:]])
    conversion.print_table(conversion.run(model, args.out, command=command, dtype=args.dtype))
