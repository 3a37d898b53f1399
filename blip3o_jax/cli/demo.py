"""Run `blip3o demo`."""

import argparse
import json
from pathlib import Path
from typing import Any

from blip3o_jax.cli import arguments, flags, settings
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.multihost import default_workdir
from blip3o_jax.config import UserError


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        run,
        "train every part from random weights, sample, score, report",
        "Makes its own data and needs no accelerator; with --config=configs/own.py:DATA it learns"
        " from the captioned pictures at DATA and samples images for held-out captions. Its last"
        " line is one JSON object with the score, the seconds it took and the path of the report.",
        again="the same command resumes from the last checkpoint in its --workdir",
    )
    flags.add_config(parser, required=False)
    parser.add_argument(
        "--workdir",
        type=arguments.path,
        metavar="DIR",
        help="(runs/demo, or runs/NAME of the config)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a smoke run: every step, with too little training to learn much",
    )


def run(args: argparse.Namespace) -> None:
    if args.config is None:
        if args.overrides:
            key, _ = args.overrides[0]
            raise UserError(f"--config.{key} changes a config: name its file with --config")
        from blip3o_jax.demo.run import run

        summary = run(args.workdir or Path("runs/demo"), fast=args.fast)
    else:
        stages = settings.load_recipe(args)
        from blip3o_jax.demo import held_out

        summary = held_out.run(stages, args.workdir or default_workdir(args.config), fast=args.fast)
    print(json.dumps(summary), flush=True)
