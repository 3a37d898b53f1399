"""Run `blip3o bench peer`."""

import argparse
import shlex
from typing import Any

from blip3o_jax.cli import arguments, flags
from blip3o_jax.cli.command import add_command
from blip3o_jax.config import SamplingConfig

_NUMBERS = ("rounds", "batch_size", "threads", "jax_devices")


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "peer",
        run,
        "compare JAX and PyTorch on the same weights and work, in turns",
        "Needs PyTorch (the extra [convert]). Compares what both compute, then times train step,"
        " decoding, denoising, autoencoder, tokenizer and text to image; writes peer.json and"
        " peer.md. float32 on a CPU, bfloat16 on a GPU.",
    )
    parser.add_argument(
        "--torch",
        type=arguments.path,
        required=True,
        metavar="HF_DIR",
        help="the PyTorch files (convert export)",
    )
    parser.add_argument(
        "--jax",
        type=arguments.path,
        required=True,
        metavar="CKPT",
        help="a working directory or checkpoint",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where the report is written",
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--items",
        type=arguments.names,
        default=(),
        metavar="NAMES",
        help="some of the items only, with commas between (all)",
    )
    parser.add_argument(
        "--rounds",
        type=arguments.integer(1, 10**6),
        default=7,
        metavar="N",
        help="rounds of each side (%(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=arguments.field(SamplingConfig, "batch_size"),
        default=4,
        metavar="N",
        help="examples, prompts, images (%(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=arguments.integer(1, 1024),
        default=2,
        metavar="N",
        help="threads of each side, on a CPU (%(default)s)",
    )
    parser.add_argument(
        "--jax_devices",
        type=arguments.integer(1, 1024),
        default=1,
        metavar="N",
        help="JAX's mesh.cpu_devices, on a CPU (%(default)s)",
    )
    parser.add_argument("--eager_only", action="store_true", help="leave compiled PyTorch out")


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.bench.peer import interleaved
    from blip3o_jax.bench.peer import report as peer_report

    options = interleaved.Options(
        device=args.device,
        rounds=args.rounds,
        batch_size=args.batch_size,
        threads=args.threads,
        jax_devices=args.jax_devices,
        items=args.items or interleaved.ITEMS,
        compiled=not args.eager_only,
    )
    report = interleaved.bench(args.torch, args.jax, args.out, options, _command_line(args))
    peer_report.print_report(report)


def _command_line(args: argparse.Namespace) -> str:
    """Return the command that repeats this measurement."""
    typed = [
        f"--{name}={getattr(args, name)}" for name in ("torch", "jax", "out", "device", *_NUMBERS)
    ]
    typed += [f"--items={flags.format_value(args.items)}"] * bool(args.items) + [
        "--eager_only"
    ] * args.eager_only
    return shlex.join(["blip3o", "bench", "peer", *typed])
