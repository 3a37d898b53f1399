"""Run `blip3o params`."""

import argparse
from typing import Any

from blip3o_jax.cli import flags, settings
from blip3o_jax.cli.command import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "params",
        run,
        "print the parameters of each part of a model",
        "Builds the model abstractly: the largest sizes answer on a laptop. Give --config, or "
        "--checkpoint for the model of a run.",
    )
    flags.add_config(parser, required=False)
    flags.add_checkpoint(parser, required=False)


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.config import UserError

    if (args.config is None) == (args.checkpoint is None):
        raise UserError("give --config=FILE.py[:ARG] or --checkpoint=DIR, one of the two")
    if args.checkpoint is not None and args.overrides:
        raise UserError("--config.* changes a --config; a --checkpoint has its own settings")
    given = settings.load(args) if args.config is not None else None
    # Late: they import jax.
    from blip3o_jax import parameter_counts
    from blip3o_jax.train import checkpoint
    from blip3o_jax.train.vocabulary import expected_vocabulary

    if given is not None:
        config, note = expected_vocabulary(given)
    else:
        root, _ = checkpoint.find(args.checkpoint)
        config = checkpoint.read_config(root)
        note = f"vocabulary: {config.model.ar.vocab_size:,} ids, by the checkpoint {root}"
    parameter_counts.print_table(config, note)
