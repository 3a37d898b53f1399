"""Define the command line: one file per command, with its flags.

Each module of a command has `add`, which adds its parser, and `run`, which imports what the command
needs and calls it. Nothing here imports jax at the top, so that --help answers at once.
"""

from blip3o_jax.cli.entry import main
from blip3o_jax.cli.parser import build_parser, parse

__all__ = ["build_parser", "main", "parse"]
