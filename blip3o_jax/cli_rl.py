"""`blip3o rl`: reinforcement learning, a server of rewards for runs elsewhere, and rewards for a
run that is over.
"""

import argparse
from collections.abc import Callable
from typing import Annotated, Any

from blip3o_jax import arguments
from blip3o_jax.config.fields import Bounds


def add(commands: Any, command: Callable, add_hosts: Callable[[Any], None], run: Callable) -> None:
    """`run` runs the command proper, `add_hosts` adds the flags of many hosts."""
    parser = command(
        commands,
        "rl",
        run,
        "improve a trained model against rewards that are computed on the host",
        "GRPO on the image tokens, Flow-GRPO on the diffusion head, or both; docs/rl.md. Resumes from the last checkpoint in "
        "the working directory.",
        again="the same command resumes from the last checkpoint in its --workdir",
    )
    parser.add_argument(
        "--config", type=arguments.config_path, metavar="FILE.py[:ARG]", help="as configs/rl.py"
    )
    parser.add_argument(
        "--workdir",
        type=arguments.path,
        metavar="DIR",
        help="for checkpoints, metrics (runs/NAME of the config)",
    )
    parser.add_argument(
        "--compile_cache",
        type=arguments.path,
        metavar="DIR",
        help="keeps compiled programs for the next start",
    )
    add_hosts(parser)
    # They do nothing before the name of a sub-command.
    flags = [action for action in parser._actions if action.dest != "help"]
    others = parser.add_subparsers(title="in place of a run", metavar="")
    _add_rescore(others, command, flags)
    server = command(
        others,
        "serve-rewards",
        _serve,
        "score images for runs elsewhere, over HTTP",
        "Takes JSON with PNG images on /score; /health and /metrics tell how it fares. A run reaches it by the reward http.",
        again="run the same command again to serve on",
    )
    server.set_defaults(flags_of_a_run=flags)
    _add_reward(server, "as in rl.rewards; repeat it for a sum", required=True)
    server.add_argument(
        "--host",
        type=arguments.word,
        default="127.0.0.1",
        help="where it listens (%(default)s); others need a token",
    )
    port = arguments.whole(0, 2**16 - 1)
    server.add_argument("--port", type=port, default=8000, help="(%(default)s)")
    server.add_argument(
        "--token_env",
        type=arguments.word,
        metavar="NAME",
        help="environment variable that holds the token",
    )
    server.add_argument(
        "--metrics_port",
        type=port,
        metavar="N",
        help="for /metrics, without the token (--port, with it)",
    )
    server.add_argument(
        "--metrics_host",
        type=arguments.word,
        default="127.0.0.1",
        help="with --metrics_port (%(default)s)",
    )
    _add_limits(server.add_argument_group("limits"))


def _add_limits(group: Any) -> None:
    """Add the limits of a reward server; the defaults are those of `rewards.server.Limits`."""
    for flag, kind, default, help in (
        ("--batch", arguments.whole(1, 4096), 16, "images scored at once"),
        ("--scorers", arguments.whole(1, 256), 2, "processes that score"),
        ("--max_body_mb", arguments.whole(1, 4096), 64, "MiB of a request"),
        ("--max_pixels", arguments.whole(1, 1 << 31), 1 << 25, "of all images of a request"),
        (
            "--max_memory_mb",
            arguments.whole(1, 1 << 20),
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


def _add_rescore(others: Any, command: Callable, flags: list[argparse.Action]) -> None:
    parser = command(
        others,
        "rescore",
        _rescore,
        "judge the images of a finished run again",
        "Of a run with rl.keep_images: by the same rewards or by others. Rewards that may run code, read files or connect "
        "elsewhere have to be named here, whatever the run's config.json says. Writes rescored.jsonl and prints both means.",
    )
    parser.set_defaults(flags_of_a_run=flags)
    # `args.run` is the command itself.
    parser.add_argument(
        "--run",
        dest="judged",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="the run's working directory",
    )
    _add_reward(parser, "in place of the run's own; repeat it for a sum", required=False)
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE", help="(rescored.jsonl in the run's directory)"
    )
    parser.set_defaults(out_is_file=True)


def _add_reward(parser: argparse.ArgumentParser, help: str, *, required: bool) -> None:
    parser.add_argument(
        "--reward",
        type=arguments.word,
        action="append",
        default=[],
        required=required,
        metavar="NAME[,OPTION=VALUE]",
        help=help,
    )


def _rescore(args: argparse.Namespace) -> None:
    from blip3o_jax.rl.rescore import print_table, rescore, rewards_of
    from blip3o_jax.rl.rewards.registry import parsed

    out = args.out or args.judged / "rescored.jsonl"
    rewards = tuple(parsed(text) for text in args.reward) or rewards_of(args.judged)
    print_table(rescore(args.judged, rewards, out), out)


def _serve(args: argparse.Namespace) -> None:
    from blip3o_jax.config import UserError
    from blip3o_jax.rl.rewards.registry import parsed

    try:
        from blip3o_jax.rl.rewards.server import Limits, serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve-rewards needs {error.name}: pip install 'blip3o_jax[serve]'"
        ) from error

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
