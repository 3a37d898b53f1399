"""Run `blip3o bench rl`."""

import argparse
import shlex
from typing import Any

from blip3o_jax.cli import arguments, settings
from blip3o_jax.cli.command import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "rl",
        run,
        "time a step of reinforcement learning by phase, and the same step done as in the"
        " published code",
        "Starts from checkpoint.init_from of the config, and runs on the devices of its mesh. Both"
        " sample the same images, in turns, and must compute the same update; writes rl.json.",
    )
    parser.add_argument(
        "--config",
        type=arguments.config_path,
        required=True,
        metavar="FILE.py[:ARG]",
        help="as configs/rl.py",
    )
    parser.add_argument(
        "--rounds",
        type=arguments.integer(1, 10**6),
        default=7,
        metavar="N",
        help="steps of each way (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where the report is written",
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.bench import rl_step

    config = settings.load(args)
    typed = [
        f"--config={args.config}",
        *(f"--config.{key}={value}" for key, value in args.overrides),
    ]
    command = shlex.join(
        ["blip3o", "bench", "rl", *typed, f"--rounds={args.rounds}", f"--out={args.out}"]
    )
    rl_step.print_report(rl_step.bench(config, args.out, rounds=args.rounds, command=command))
