"""Run a command and report how it ends.

An error a user can cause ends with one line on stderr and status 2 (BLIP3O_TRACEBACK=1 shows where
it was raised); any other exception is a bug and keeps its traceback.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from blip3o_jax import exits, files
from blip3o_jax.cli.compilation_cache import set_compilation_cache
from blip3o_jax.cli.parser import parse
from blip3o_jax.config import UserError
from blip3o_jax.config.errors import escaped


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit status: 0, 1 (a comparison failed), 2 (a user's
    error), 75 (stopped by SIGTERM; run it again), 130 (Ctrl-C), 137 (another host was lost; run it
    again), 141 (nobody reads the output).
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    exits.process.reporter = lambda error: _report(error, args)
    exits.process.restart_hint = args.after_interrupt
    if args.stops_on_sigterm:
        exits.listen_for_stop(
            f"stopped by SIGTERM, with nothing to save yet; {args.after_interrupt}"
        )
    try:
        _check_out(args)
        set_compilation_cache(getattr(args, "compile_cache", None))
        return args.run(args) or 0
    # KeyboardInterrupt is no Exception, and has an exit status too.
    except BaseException as error:
        status = exits.process.report(error)
        if status is None:
            raise
        return status


def _report(error: BaseException, args: argparse.Namespace) -> int | None:
    """Report a user's error, a signal or a lost host in one line and return the exit status; None
    for a bug.
    """
    if isinstance(error, KeyboardInterrupt):
        exits.process.print_line(f"blip3o: interrupted; {args.after_interrupt}")
        return exits.INTERRUPTED
    if exits.is_broken_pipe(error):
        return exits.BROKEN_PIPE
    if isinstance(error, exits.RunEnded):
        exits.process.print_line(f"blip3o: {_one_line(error)}")
        return error.status
    line = _line(error, args)
    if line is None:
        return None
    if os.environ.get("BLIP3O_TRACEBACK") == "1":
        traceback.print_exception(error)
    exits.process.print_line(f"blip3o: error: {line}")
    return exits.USER_ERROR


def _line(error: BaseException, args: argparse.Namespace) -> str | None:
    """Return what is wrong and what to do where a user can cause the error, else None."""
    if isinstance(error, UserError):
        return _one_line(error)
    if line := exits.stdout_line(error):
        return line
    found = files.system_error(error)
    if found is None:
        return None
    # A write to an open file that fails, on a full disk for one, names no file.
    if found.filename is None and getattr(args, "out", None):
        found.filename = str(args.out)
    return escaped(files.describe(found)) + (
        f"; {args.after_interrupt}" if found.errno in files.TROUBLE else ""
    )


def _check_out(args: argparse.Namespace) -> None:
    """Refuse a path for output that cannot be written, before anything is computed."""
    if getattr(args, "out", None) is not None:
        (files.check_out_file if args.out_is_file else files.check_out_directory)(args.out)


def _one_line(error: BaseException) -> str:
    return escaped(" ".join(str(error).split()))
