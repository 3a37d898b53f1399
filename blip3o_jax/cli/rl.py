"""Run `blip3o rl`, the parent of `rl rescore` and `rl serve-rewards`."""

import argparse
from pathlib import Path
from typing import Any

from blip3o_jax.cli import arguments, flags, rl_rescore, rl_serve_rewards, settings
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.multihost import on_all_hosts
from blip3o_jax.config import UserError


def add(commands: Any) -> None:
    """Add `rl` to the command line, with the sub-commands that take none of its flags."""
    parser = add_command(
        commands,
        "rl",
        run,
        "improve a trained model against rewards that are computed on the host",
        "GRPO on the image tokens, Flow-GRPO on the diffusion head, or both; docs/rl.md. Resumes"
        " from the last checkpoint in the working directory.",
        again="the same command resumes from the last checkpoint in its --workdir",
    )
    parser.add_argument(
        "--config", type=arguments.config_path, metavar="FILE.py[:ARG]", help="as configs/rl.py"
    )
    flags.add_workdir(parser)
    flags.add_hosts(parser)
    parser.set_defaults(stops_on_sigterm=True)
    # These flags do nothing before the name of a sub-command.
    run_flags = [action for action in parser._actions if action.dest != "help"]
    others = parser.add_subparsers(title="in place of a run", metavar="")
    rl_rescore.add(others, run_flags)
    rl_serve_rewards.add(others, run_flags)


def run(args: argparse.Namespace) -> int:
    if not args.config:
        raise UserError(
            "rl needs a config file and a checkpoint to start from: --config=configs/rl.py:ocr:DIR,"
            " where DIR is the --workdir of a finished run of stage joint; only rl rescore and rl"
            " serve-rewards need none"
        )
    config = settings.load(args)

    def job(workdir: Path) -> None:
        from blip3o_jax.rl import trainer

        trainer.run(config, workdir)

    return on_all_hosts(args, {"": config}, job)
