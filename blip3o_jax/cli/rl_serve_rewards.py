"""Run `blip3o rl serve-rewards`."""

import argparse
from typing import Annotated, Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command
from blip3o_jax.config import UserError
from blip3o_jax.config.constraints import Bounds
from blip3o_jax.config.errors import install_command


def add(commands: Any, run_flags: list[argparse.Action]) -> None:
    """Add `rl serve-rewards`; it refuses `run_flags`, those of `rl` itself."""
    parser = add_command(
        commands,
        "serve-rewards",
        run,
        "score images for runs elsewhere, over HTTP",
        "Takes JSON with PNG images on /score; /health and /metrics report its state. A run reaches"
        " it by the reward http.",
        again="run the same command again to serve on",
    )
    parser.set_defaults(flags_of_a_run=run_flags)
    flags.add_reward(parser, "as in rl.rewards; repeat it for a sum", required=True)
    parser.add_argument(
        "--host",
        type=arguments.word,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where it listens (%(default)s); others need a token",
    )
    port = arguments.integer(0, 2**16 - 1)
    parser.add_argument("--port", type=port, default=8000, help="(%(default)s)")
    parser.add_argument(
        "--token_env",
        type=arguments.word,
        metavar="NAME",
        help="environment variable that holds the token",
    )
    parser.add_argument(
        "--metrics_port",
        type=port,
        metavar="N",
        help="for /metrics, without the token (--port, with it)",
    )
    parser.add_argument(
        "--metrics_host",
        type=arguments.word,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where /metrics listens, with --metrics_port (%(default)s)",
    )
    _add_limits(parser.add_argument_group("limits"))


def _add_limits(group: Any) -> None:
    """Add the limits of a reward server; the defaults are those of `rewards.server.Limits`."""
    for flag, kind, default, help in (
        ("--batch", arguments.integer(1, 4096), 16, "images scored at once"),
        ("--scorers", arguments.integer(1, 256), 2, "processes that score"),
        ("--max_body_mb", arguments.integer(1, 4096), 64, "MiB of a request"),
        ("--max_pixels", arguments.integer(1, 1 << 31), 1 << 25, "of all images of a request"),
        (
            "--max_memory_mb",
            arguments.integer(1, 1 << 20),
            4096,
            "MiB in all, without the rewards' models",
        ),
    ):
        group.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{help} (%(default)s)"
        )
    group.add_argument(
        "--score_timeout",
        type=arguments.number(Annotated[float, Bounds(0.001, 86400)]),
        default=120.0,
        metavar="SECONDS",
        help="for a batch; then its process ends (%(default)g)",
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.rl.rewards.registry import parsed

    try:
        from blip3o_jax.rl.rewards.server import Limits, serve
    except ModuleNotFoundError as error:
        raise UserError(f"serve-rewards needs {error.name}: {install_command('serve')}") from error

    limits = Limits(
        batch=args.batch,
        scorers=args.scorers,
        score_seconds=args.score_timeout,
        max_body=args.max_body_mb << 20,
        max_pixels=args.max_pixels,
        max_memory=args.max_memory_mb << 20,
    )
    serve(
        tuple(parsed(text) for text in args.reward),
        args.host,
        args.port,
        token_env=args.token_env or "",
        metrics_host=args.metrics_host,
        metrics_port=args.metrics_port,
        limits=limits,
    )
