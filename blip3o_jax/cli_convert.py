"""`blip3o convert import|export|verify`: parses and calls, nothing else."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from blip3o_jax import arguments, files
from blip3o_jax.config import MeshConfig, UserError, fields, from_dict
from blip3o_jax.config.fields import UINT32, escaped

DTYPES = ("float32", "bfloat16", "float16")
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


def add(commands: Any, command: Callable) -> None:
    """Adds `convert` to the command line; `command` makes a sub-command (cli.py)."""
    convert = commands.add_parser(
        "convert",
        help="PyTorch weights in, and out again",
        description="Between PyTorch checkpoints (safetensors, the published names) and checkpoints of this package.",
    )
    ways = convert.add_subparsers(title="ways", metavar="WAY", required=True)
    _add_import(ways, command)
    _add_export(ways, command)
    _add_verify(ways, command)


def _add_source(parser: argparse.ArgumentParser, flag: str) -> None:
    parser.add_argument(
        flag,
        type=arguments.path,
        required=True,
        metavar="HF_DIR",
        help="a BLIP3o-NEXT directory, or a stock Qwen3 one",
    )
    parser.add_argument(
        "--diffusion",
        type=arguments.path,
        metavar="DIR",
        help="a SANA diffusers directory: transformer/, vae/, scheduler/",
    )
    parser.add_argument(
        "--ta_tok",
        type=arguments.path,
        metavar="FILE",
        help="the vision tokenizer's own file (ta_tok.pth)",
    )
    parser.add_argument(
        "--ta_tok_config",
        type=arguments.path,
        metavar="FILE.json",
        help="sizes of another vision tokenizer than the published: encoder, decoder, bottleneck_dim, codebook_size, "
        "select_layer, l2_normalized",
    )
    parser.add_argument(
        "--variant",
        type=arguments.text,
        default="",
        metavar="NAME",
        help="weights to take where a directory has several: bf16 for model.bf16.safetensors (the ones without a name)",
    )
    parser.add_argument(
        "--initialise",
        type=arguments.names,
        default=(),
        metavar="NAMES",
        help="what the files lack and is to be made: connector, image_embeddings, latent_connector, feature_connector",
    )


def _add_import(ways: Any, command: Callable) -> None:
    parser = command(
        ways,
        "import",
        _import,
        "PyTorch files to a checkpoint",
        "Sizes and options are read from the files' own config.json. Tensors are read one by one; nothing is dropped, renamed "
        "or cast unless a flag says so.",
    )
    _add_source(parser, "--source")
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="CKPT",
        help="the checkpoint directory to write",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="", help="of the parameters (that of the files)"
    )
    parser.add_argument(
        "--mesh",
        type=_mesh,
        metavar="SIZES",
        help="where the arrays are to lie, as data=1,fsdp=8,strategy=fsdp (one copy a device)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output at --out"
    )


def _add_export(ways: Any, command: Callable) -> None:
    parser = command(
        ways,
        "export",
        _export,
        "a checkpoint to PyTorch files",
        "Writes the published BLIP3o-NEXT layout, or with --parts the directories that the stock classes load.",
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
        "--dtype", choices=DTYPES, default="", help="of the tensors (that of the checkpoint)"
    )
    parser.add_argument(
        "--max_shard_size", type=_size, default=5 * 10**9, metavar="SIZE", help="of one file (5GB)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the averaged weights in place of the last ones"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output at --out"
    )


def _add_verify(ways: Any, command: Callable) -> None:
    parser = command(
        ways,
        "verify",
        _verify,
        "compare a PyTorch directory with a checkpoint, weights and outputs",
        "Runs both sides in float32 on the same seeded inputs; needs PyTorch (the extra [convert]). Ends with status 1 where "
        "they differ, naming the tensor and the first layer.",
    )
    _add_source(parser, "--torch")
    parser.add_argument(
        "--jax",
        type=arguments.path,
        required=True,
        metavar="CKPT",
        help="a working directory or checkpoint",
    )
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE.json", help="the numbers, as JSON"
    )
    parser.set_defaults(out_is_file=True)
    parser.add_argument(
        "--parts",
        type=arguments.names,
        default=(),
        metavar="NAMES",
        help="some of the parts only (all)",
    )
    parser.add_argument("--ema", action="store_true", help="compare the averaged weights")
    parser.add_argument(
        "--seed", type=arguments.whole(0, UINT32), default=0, help="of the inputs (%(default)s)"
    )


def _import(args: argparse.Namespace) -> None:
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
    _print_notes(source.notes)
    done = import_weights(source, args.out, args.mesh, overwrite=args.overwrite)
    print(
        f"imported {_bytes(done.parameters)} of parameters into {args.out} in {done.seconds:.1f} s (reading "
        f"{done.read_seconds:.1f} s, {_bytes(done.parameters / done.read_seconds)}/s)\n"
        f"memory: {_bytes(done.staying)} stay on this host, the largest tensor has {_bytes(done.largest)}; peak "
        f"{_bytes(done.peak)} resident, at most {_bytes(done.allowed)} meant"
    )


def _export(args: argparse.Namespace) -> None:
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
    _print_notes(done.notes)
    print(
        f"exported {done.tensors} tensors, {_bytes(done.size)}, to {args.out} in {done.seconds:.1f} s "
        f"({_bytes(done.size / done.seconds)}/s), peak {_bytes(done.peak)} resident"
    )


def _verify(args: argparse.Namespace) -> int:
    from blip3o_jax.convert.report import print_report
    from blip3o_jax.convert.verify import verify

    report = verify(
        args.torch,
        args.jax,
        diffusion=args.diffusion,
        ta_tok=args.ta_tok,
        ta_tok_config=args.ta_tok_config,
        initialise=args.initialise,
        variant=args.variant,
        ema=args.ema,
        parts=args.parts,
        seed=args.seed,
    )
    print_report(report)
    if args.out:
        files.write_json(args.out, report.to_dict())
    return 0 if report.ok else 1


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"note: {escaped(note)}", file=sys.stderr)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _size(text: str) -> int:
    """Bytes of 5GB, 500MB, 2GiB."""
    number = text.upper().rstrip("BKMGTI")
    unit = text.upper()[len(number) :] or "B"
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if not 1 <= size < 2**60:
        raise argparse.ArgumentTypeError(
            f"{fields.shown(text)} is no size, such as 5GB, 500MB or 2GiB"
        )
    return size


def _mesh(text: str) -> MeshConfig:
    """data=1,fsdp=8,strategy=fsdp as MeshConfig."""
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
