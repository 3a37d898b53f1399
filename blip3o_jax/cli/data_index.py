"""Run `blip3o data index`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments
from blip3o_jax.cli.command import add_command

SHOWN = 50  # unusable records, each in a line


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "index",
        run,
        "read a data set once, store checksums of its records and name the unusable ones",
        "A run stores the checksums when it opens a set for the first time; index a large set"
        " before a run. Reads the shards that have no index, and those whose size or modification"
        " time has changed; then decodes the images of all records. Prints the number of records,"
        " and each that cannot be used with the reason.",
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
    parser.add_argument(
        "--no_decode", action="store_true", help="store the checksums only: decode no image"
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.config import SourceConfig
    from blip3o_jax.data import usable
    from blip3o_jax.data.index_builder import ALL, CHANGED
    from blip3o_jax.data.sources import open_source

    cfg = SourceConfig(args.path, args.format, split=args.split, images=args.images)
    source = open_source(cfg, rebuild=ALL if args.all else CHANGED)
    for note in source.notes:
        print(note)
    found = f"{len(source)} records"
    if not args.no_decode:
        count, reasons = usable.find_unusable(source, SHOWN)
        for reason in reasons:
            print(reason)
        if count > SHOWN:
            print(f"{source.name}: {count - SHOWN} more records cannot be used")
        if count:
            found += f", {len(source) - count} of them usable"
    print(f"{source.name}: {found}, digest {source.fingerprint}")
    if source.reused:
        print(
            f"{source.reused} of {len(source.files)} shards, of the same size and modification time"
            " as before, were not read again; --all reads them"
        )
