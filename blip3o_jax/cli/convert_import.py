"""Run `blip3o convert import`."""

import argparse
from typing import Any

from blip3o_jax.cli import arguments
from blip3o_jax.cli.command import add_command
from blip3o_jax.cli.convert_source import DTYPES, add_source, format_bytes, print_notes
from blip3o_jax.config import MeshConfig, UserError, fields, from_dict


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "import",
        run,
        "convert PyTorch files to a checkpoint",
        "Sizes and options are read from the files' own config.json. Tensors are read one by one;"
        " nothing is dropped, renamed or cast unless a flag says so.",
    )
    add_source(parser, "--source")
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="CKPT",
        help="the checkpoint directory to write",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="", help="dtype of the parameters (the files')"
    )
    parser.add_argument(
        "--mesh",
        type=_mesh,
        metavar="SIZES",
        help="sharding of the arrays, as data=1,fsdp=8,strategy=fsdp (one copy a device)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output at --out"
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.convert.importer import import_weights
    from blip3o_jax.convert.source import open_source

    source = open_source(
        args.source,
        diffusion=args.diffusion,
        ta_tok=args.ta_tok,
        ta_tok_config=args.ta_tok_config,
        initialise=args.initialise,
        variant=args.variant,
        dtype=args.dtype,
    )
    print_notes(source.notes)
    done = import_weights(source, args.out, args.mesh, overwrite=args.overwrite)
    print(
        f"imported {format_bytes(done.parameters)} of parameters into {args.out} in"
        f" {done.seconds:.1f} s (reading {done.read_seconds:.1f} s,"
        f" {format_bytes(done.parameters / done.read_seconds)}/s)\nmemory:"
        f" {format_bytes(done.host_bytes)} stay on this host, the largest tensor has"
        f" {format_bytes(done.largest)}; peak {format_bytes(done.peak)} resident, at most"
        f" {format_bytes(done.allowed)} meant"
    )


def _mesh(text: str) -> MeshConfig:
    """Parse a mesh such as data=1,fsdp=8,strategy=fsdp to a MeshConfig."""
    values: dict[str, Any] = {}
    types = fields.field_types(MeshConfig)
    try:
        for item in arguments.names(text):
            name, _, value = item.partition("=")
            values[name] = (
                fields.parse(value, types[name], f"--mesh.{name}") if name in types else value
            )
        return from_dict(values, MeshConfig, "--mesh")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
