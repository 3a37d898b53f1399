"""Run `blip3o demo`."""

import argparse
import json
from pathlib import Path
from typing import Any

from blip3o_jax.cli import arguments
from blip3o_jax.cli.command import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        run,
        "train every part from random weights, sample, score, report",
        "Makes its own data and needs no accelerator. Its last line is one JSON object with the"
        " score, the seconds it took and the path of the report.",
    )
    parser.add_argument(
        "--workdir",
        type=arguments.path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a smoke run: every step, with too little training to learn much",
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.demo.run import run

    summary = run(args.workdir, fast=args.fast)
    print(json.dumps(summary), flush=True)
