"""Run `blip3o data index`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments
from blip3o_jax.cli.command import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "index",
        run,
        "read a data set once and store checksums of its records",
        "A run does this when it opens a set for the first time; index a large set before a run."
        " Reads the shards that have no index, and those whose size or modification time has"
        " changed; prints the number of records.",
        again="the same command continues with the shards that have no index yet",
    )
    parser.add_argument("path", type=arguments.word, metavar="PATH", help="as data.path")
    parser.add_argument(
        "--format",
        type=arguments.text,
        default="auto",
        metavar="NAME",
        help="as data.format (%(default)s)",
    )
    parser.add_argument(
        "--split",
        type=arguments.text,
        default="train",
        metavar="NAME",
        help="as data.split (%(default)s)",
    )
    parser.add_argument(
        "--images", type=arguments.text, default="", metavar="DIR", help="as data.images"
    )
    parser.add_argument("--all", action="store_true", help="read every shard again")


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.config import SourceConfig
    from blip3o_jax.data.index_builder import ALL, CHANGED
    from blip3o_jax.data.sources import open_source

    cfg = SourceConfig(args.path, args.format, split=args.split, images=args.images)
    source = open_source(cfg, rebuild=ALL if args.all else CHANGED)
    for note in source.notes:
        print(note)
    print(f"{source.name}: {len(source)} records, digest {source.fingerprint}")
    if not args.all:
        print("shards of the same size and modification time were not read again; --all reads them")
