"""Run `blip3o convert export`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.convert_source import DTYPES, format_bytes, print_notes
from blip3o_jax.config import errors

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        run,
        "convert a checkpoint to PyTorch files",
        "Writes the published BLIP3o-NEXT layout, or with --parts the directories that the stock"
        " classes load.",
    )
    parser.add_argument(
        "--source",
        type=arguments.path,
        required=True,
        metavar="CKPT",
        help="a working directory or checkpoint",
    )
    parser.add_argument(
        "--out", type=arguments.path, required=True, metavar="HF_DIR", help="the directory to write"
    )
    parser.add_argument(
        "--parts",
        type=arguments.names,
        default=(),
        metavar="NAMES",
        help="some of ar, dit, vae, ta_tok, as stock directories",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="", help="dtype of the tensors (the checkpoint's)"
    )
    parser.add_argument(
        "--max_shard_size",
        type=_size,
        default=5 * 10**9,
        metavar="SIZE",
        help="maximum size of one file (5GB)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the averaged weights in place of the last ones"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output at --out"
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.convert.exporter import export_weights

    done = export_weights(
        args.source,
        args.out,
        parts=args.parts,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_size,
        ema=args.ema,
        overwrite=args.overwrite,
    )
    print_notes(done.notes)
    print(
        f"exported {done.tensors} tensors, {format_bytes(done.size)}, to {args.out} in"
        f" {done.seconds:.1f} s ({format_bytes(done.size / done.seconds)}/s), peak"
        f" {format_bytes(done.peak)} resident"
    )


def _size(text: str) -> int:
    """Return the bytes of a size such as 5GB, 500MB or 2GiB."""
    number = text.upper().rstrip("BKMGTI")
    unit = text.upper()[len(number) :] or "B"
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if not 1 <= size < 2**60:
        raise argparse.ArgumentTypeError(
            f"{errors.shown(text)} is no size, such as 5GB, 500MB or 2GiB"
        )
    return size
