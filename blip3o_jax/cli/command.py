"""Add a command to the command line."""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from blip3o_jax.config.errors import did_you_mean, not_a_choice, shown


class Parser(argparse.ArgumentParser):
    """Refuse bad arguments with one line, where argparse would print the usage too."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            # A prefix of a flag is no flag: it would become ambiguous with the next flag of that
            # prefix. The raw formatter leaves the lines of the epilog, which are examples, as they
            # are.
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Before argparse looks: it would report a required flag that is misspelt as missing.
        if args is not None and self._subparsers is None:
            for flag in args:
                name = flag.partition("=")[0]
                if name.startswith("--") and name not in self._option_string_actions:
                    self.unrecognized(flag)
        return super().parse_known_args(args, namespace)

    def unrecognized(self, flag: str) -> NoReturn:
        """Exit with the error of a flag that the command does not take; names the nearest."""
        near = did_you_mean(flag.partition("=")[0], self._option_string_actions)
        self.error(f"unrecognized argument: {quoted(flag)}{near and f'; {near}'}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action, f"{shown(value)} {not_a_choice(value, action.choices)}"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"blip3o: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def quoted(flag: str) -> str:
    """Return the flag on one line, without quotes around it."""
    return shown(flag)[1:-1]


def add_command(
    commands: Any, name: str, run: Callable, help: str, description: str = "", again: str = ""
) -> Parser:
    """Add a command that calls `run` with its parsed arguments; `again` says what running it again
    after an interrupt does.
    """
    # Wrapped here, since the raw formatter wraps nothing.
    description = textwrap.fill(f"{help[0].upper()}{help[1:]}. {description}", 100)
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(
        run=run, after_interrupt=again or "run the same command again to start over"
    )
    parser.set_defaults(flags_of_a_run=(), out_is_file=False, stops_on_sigterm=False)
    return parser
