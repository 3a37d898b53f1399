"""`blip3o rl`: reinforcement learning, and a server of rewards for runs elsewhere."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip3o_jax.config import RewardConfig


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
    servers = parser.add_subparsers(title="in place of a run", metavar="")
    server = command(
        servers,
        "serve-rewards",
        _serve,
        "score images for runs elsewhere, over HTTP",
        "Takes JSON with PNG images on /score; /health and /metrics tell how it fares. A run reaches it by the reward http.",
        again="run the same command again to serve on",
    )
    server.add_argument(
        "--reward", action="append", required=True, metavar="NAME", help="as in rl.rewards; repeat it for a sum"
    )
    server.add_argument("--host", default="127.0.0.1", help="where it listens (%(default)s); others need a token")
    server.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    server.add_argument("--token_env", default="", metavar="NAME", help="environment variable that holds the token")
    server.add_argument("--max_body_mb", type=int, default=64, metavar="N", help="of a request (%(default)s)")
    server.add_argument("--batch", type=int, default=16, metavar="N", help="images scored at once (%(default)s)")


def _serve(args: argparse.Namespace) -> None:
    from blip3o_jax.rl.rewards.server import serve
    from blip3o_jax.rl.rewards.weighted import WeightedRewards

    reward = WeightedRewards(tuple(RewardConfig(name=name) for name in args.reward))
    serve(reward, args.host, args.port, token_env=args.token_env, max_body_mb=args.max_body_mb, batch=args.batch)
