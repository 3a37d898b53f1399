"""`blip3o rl`: reinforcement learning, a server of rewards for runs elsewhere, and rewards for a run that is over."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add(commands: Any, command: Callable, add_hosts: Callable[[Any], None], run: Callable, directory: Callable) -> None:
    """`run` runs the command proper, `add_hosts` adds the flags of many hosts, `directory` reads a working directory."""
    parser = command(
        commands,
        "rl",
        run,
        "improve a trained model against rewards that are computed on the host",
        "GRPO on the image tokens, Flow-GRPO on the diffusion head, or both; docs/rl.md. Resumes from the last checkpoint in "
        "the working directory.",
        again="the same command resumes from the last checkpoint in its --workdir",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="as configs/rl.py")
    parser.add_argument("--workdir", type=directory, metavar="DIR", help="for checkpoints, metrics (runs/NAME of the config)")
    parser.add_argument("--compile_cache", type=Path, metavar="DIR", help="keeps compiled programs for the next start")
    add_hosts(parser)
    others = parser.add_subparsers(title="in place of a run", metavar="")
    _add_rescore(others, command, directory)
    server = command(
        others,
        "serve-rewards",
        _serve,
        "score images for runs elsewhere, over HTTP",
        "Takes JSON with PNG images on /score; /health and /metrics tell how it fares. A run reaches it by the reward http.",
        again="run the same command again to serve on",
    )
    _add_reward(server, "as in rl.rewards; repeat it for a sum", required=True)
    server.add_argument("--host", default="127.0.0.1", help="where it listens (%(default)s); others need a token")
    server.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    server.add_argument("--token_env", default="", metavar="NAME", help="environment variable that holds the token")
    server.add_argument("--max_body_mb", type=int, default=64, metavar="N", help="of a request (%(default)s)")
    server.add_argument("--batch", type=int, default=16, metavar="N", help="images scored at once (%(default)s)")


def _add_rescore(others: Any, command: Callable, directory: Callable) -> None:
    parser = command(
        others,
        "rescore",
        _rescore,
        "judge the images of a finished run again",
        "Of a run with rl.keep_images: by the same rewards or by others. Writes rescored.jsonl and prints both means.",
    )
    # `args.run` is the command itself.
    parser.add_argument(
        "--run", dest="judged", type=directory, required=True, metavar="DIR", help="the run's working directory"
    )
    _add_reward(parser, "in place of the run's own; repeat it for a sum", required=False)
    parser.add_argument("--out", type=Path, metavar="FILE", help="(rescored.jsonl in the run's directory)")
    parser.set_defaults(out_is_file=True)


def _add_reward(parser: argparse.ArgumentParser, help: str, *, required: bool) -> None:
    parser.add_argument("--reward", action="append", default=[], required=required, metavar="NAME[,OPTION=VALUE]", help=help)


def _rescore(args: argparse.Namespace) -> None:
    from blip3o_jax.rl.rescore import print_table, rescore, rewards_of
    from blip3o_jax.rl.rewards.registry import parsed

    out = args.out or args.judged / "rescored.jsonl"
    rewards = tuple(parsed(text) for text in args.reward) or rewards_of(args.judged)
    print_table(rescore(args.judged, rewards, out), out)


def _serve(args: argparse.Namespace) -> None:
    from blip3o_jax.rl.rewards.registry import parsed
    from blip3o_jax.rl.rewards.server import serve
    from blip3o_jax.rl.rewards.weighted import WeightedRewards

    reward = WeightedRewards(tuple(parsed(text) for text in args.reward))
    serve(reward, args.host, args.port, token_env=args.token_env, max_body_mb=args.max_body_mb, batch=args.batch)
