"""Run `blip3o rl rescore`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command


def add(commands: Any, run_flags: list[argparse.Action]) -> None:
    """Add `rl rescore`; it refuses `run_flags`, those of `rl` itself."""
    parser = add_command(
        commands,
        "rescore",
        run,
        "score the images of a finished run again",
        "Of a run with rl.keep_images: by the same rewards or by others. Rewards that may run code,"
        " read files or connect elsewhere have to be named here, whatever the run's config.json"
        " says. Writes rescored.jsonl and prints both means.",
    )
    parser.set_defaults(flags_of_a_run=run_flags)
    # `args.run` is the command itself.
    parser.add_argument(
        "--run",
        dest="run_dir",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="the run's working directory",
    )
    flags.add_reward(parser, "in place of the run's own; repeat it for a sum", required=False)
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE", help="(rescored.jsonl in the run's directory)"
    )
    parser.set_defaults(out_is_file=True)


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.rl.rescore import print_table, rescore, rewards_of
    from blip3o_jax.rl.rewards.registry import parsed

    out = args.out or args.run_dir / "rescored.jsonl"
    rewards = tuple(parsed(text) for text in args.reward) or rewards_of(args.run_dir)
    print_table(rescore(args.run_dir, rewards, out), out)
