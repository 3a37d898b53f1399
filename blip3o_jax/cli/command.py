"""Add a command to the command line."""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Refuse bad arguments with one line, where argparse would print the usage too."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"blip3o: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def add_command(
    commands: Any, name: str, run: Callable, help: str, description: str = "", again: str = ""
) -> Parser:
    """Add a command that calls `run` with its parsed arguments; `again` says what running it again
    after an interrupt does.
    """
    description = textwrap.fill(f"{help[0].upper()}{help[1:]}. {description}", 100)
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(
        run=run, after_interrupt=again or "run the same command again to start over"
    )
    parser.set_defaults(flags_of_a_run=(), out_is_file=False, stops_on_sigterm=False)
    return parser
