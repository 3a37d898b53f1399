"""Add the flags that several commands share."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments
from blip3o_jax.config import SamplingConfig
from blip3o_jax.config.types import UINT32

SAMPLING = (
    "steps",
    "guidance",
    "reference_guidance",
    "token_guidance",
    "temperature",
    "top_k",
    "top_p",
    "batch_size",
)


SEED = arguments.integer(0, UINT32)


def sampling(name: str) -> arguments.Argument:
    return arguments.field(SamplingConfig, name)


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--config",
        type=arguments.config_path,
        required=required,
        metavar="FILE.py[:ARG]",
        help="a file under configs/, and its argument",
    )
    parser.epilog = (
        "any field of the config can be set, and a later flag wins:\n"
        "  --config.optimizer.learning_rate=1e-4  --config.data.path=photos.tar\n"
        "  --config.trainable=\"('ar/.*', 'connector/.*')\""
    )


def add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--checkpoint",
        type=arguments.path,
        required=required,
        metavar="DIR",
        help="a working directory or checkpoint",
    )


def add_workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir",
        type=arguments.path,
        metavar="DIR",
        help="directory of checkpoints and metrics (runs/NAME of the config)",
    )
    parser.add_argument(
        "--compile_cache",
        type=arguments.path,
        metavar="DIR",
        help="directory that stores compiled programs for the next start (in ~/.cache/blip3o_jax)",
    )


def add_hosts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many hosts", "one process each; docs/pods.md describes the launchers"
    )
    group.add_argument(
        "--distributed",
        choices=("auto", "off", "tpu", "slurm"),
        default="auto",
        help=(
            "how hosts find each other: by a TPU slice's metadata, by Slurm's variables, or by the"
            " one that is available (%(default)s)"
        ),
    )
    group.add_argument(
        "--coordinator",
        type=arguments.address,
        metavar="HOST:PORT",
        help="address of host 0, in place of --distributed",
    )
    group.add_argument(
        "--num_processes",
        type=arguments.integer(1, 2**20),
        metavar="N",
        help="with --coordinator: number of hosts",
    )
    group.add_argument(
        "--process_id",
        type=arguments.integer(0, 2**20),
        metavar="I",
        help="with --coordinator: number of this host, from 0",
    )


def add_sampling(parser: argparse.ArgumentParser, *, from_images: bool) -> None:
    """Add the flags of sampling; `from_images`: those of a command that takes images too."""
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="directory of the images; replaces an earlier run's",
    )
    parser.add_argument(
        "--size",
        type=arguments.size,
        metavar="HxW",
        help=(
            "pixels (the model's size nearest to the first image's aspect ratio)"
            if from_images
            else "pixels (the model's first size)"
        ),
    )
    parser.add_argument("--seed", type=SEED, default=0, help="(%(default)s)")
    group = parser.add_argument_group("sampling", "defaults are those of the checkpoint's config")
    group.add_argument("--steps", type=sampling("steps"), metavar="N", help="denoising steps")
    group.add_argument(
        "--guidance",
        type=sampling("guidance"),
        metavar="SCALE",
        help="classifier-free guidance; 1 turns it off",
    )
    if from_images:
        group.add_argument(
            "--reference_guidance",
            type=sampling("reference_guidance"),
            metavar="SCALE",
            help="guidance towards the reference images; 0: the same as --guidance",
        )
    group.add_argument(
        "--token_guidance",
        type=sampling("token_guidance"),
        metavar="SCALE",
        help="classifier-free guidance of the image tokens",
    )
    group.add_argument(
        "--temperature",
        type=sampling("temperature"),
        metavar="T",
        help="temperature of the image tokens",
    )
    group.add_argument(
        "--top_k", type=sampling("top_k"), metavar="K", help="image tokens kept at each position"
    )
    group.add_argument(
        "--top_p",
        type=sampling("top_p"),
        metavar="P",
        help="probability mass kept at each position",
    )
    group.add_argument(
        "--batch_size", type=sampling("batch_size"), metavar="N", help="images sampled at once"
    )


def format_value(value: Any) -> str:
    """Return a flag's value as a command line has it."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def add_reward(parser: argparse.ArgumentParser, help: str, *, required: bool) -> None:
    parser.add_argument(
        "--reward",
        type=arguments.word,
        action="append",
        default=[],
        required=required,
        metavar="NAME[,OPTION=VALUE]",
        help=help,
    )
