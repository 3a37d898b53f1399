"""Parse the command line: the parser of all commands, and the overrides of their settings."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from blip3o_jax import __version__
from blip3o_jax.cli import (
    ask,
    bench_anchors,
    bench_conversion,
    bench_peer,
    bench_rl,
    bench_sharding,
    convert_export,
    convert_import,
    convert_verify,
    data_index,
    data_shapes,
    demo,
    edit,
    evaluate,
    params,
    reconstruct,
    rl,
    sample,
    train,
)
from blip3o_jax.cli.command import Parser, quoted

_EXAMPLES = """\
examples:
  blip3o demo                                             train everything on 2 cores
  blip3o demo --config=configs/own.py:photos              train on your captioned pictures
  blip3o data shapes --out=data/shapes                    draw the embedded data set
  blip3o train --config=configs/overfit.py --workdir=runs/mine --config.data.path=photos.tar
  blip3o sample --checkpoint=runs/mine --prompt="a red circle" --out=samples
  blip3o edit --checkpoint=runs/mine --image=in.png --instruction="a green sky" --out=edited
  blip3o evaluate --checkpoint=runs/mine --suite=shapes --out=scores
  blip3o params --config=configs/pretrain.py:1.7b         how large each part is
  blip3o convert import --source=BLIP3o-NEXT --diffusion=SANA --out=checkpoint

blip3o COMMAND --help lists its flags. BLIP3O_TRACEBACK=1 adds the traceback to an error's line.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of one command: `run` is what to call with them, `overrides` the (field,
    text) of each --config.field=text.
    """
    parser = build_parser()
    # argparse never sees them: where a command has sub-commands it takes an unknown --x="a b" for
    # one.
    overrides = [flag for flag in argv if flag.startswith("--config.")]
    if bare := [flag for flag in overrides if "=" not in flag]:
        parser.error(f"{quoted(bare[0])} needs a value: {quoted(bare[0])}=VALUE")
    args, unknown = parser.parse_known_args(
        [flag for flag in argv if not flag.startswith("--config.")]
    )
    if unknown:
        parser.unrecognized(unknown[0])
    for flag in args.flags_of_a_run:
        if getattr(args, flag.dest) != flag.default:
            parser.error(
                f"{flag.option_strings[0]} is for a run of rl and does nothing here: leave it out"
            )
    if overrides and (args.flags_of_a_run or not hasattr(args, "config")):
        parser.error(f"unrecognized argument: {quoted(overrides[0])}")
    pairs = (flag.removeprefix("--config.").partition("=") for flag in overrides)
    args.overrides = [(key, value) for key, _, value in pairs]
    return args


def build_parser() -> Parser:
    """Build the parser of the whole command line, without importing jax."""
    parser = Parser(
        prog="blip3o",
        description="BLIP3o-NEXT: train it, sample from it, measure it.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"blip3o_jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_group(commands, "data", "prepare a data set", "data sets", (data_shapes, data_index))
    for module in (train, sample, edit, reconstruct, ask, evaluate, params, demo, rl):
        module.add(commands)
    _add_group(
        commands,
        "convert",
        "PyTorch weights in, and out again",
        "ways",
        (convert_import, convert_export, convert_verify),
        "Between PyTorch checkpoints (safetensors, the published names) and checkpoints of this"
        " package.",
    )
    _add_group(
        commands,
        "bench",
        "measure speed and memory",
        "benchmarks",
        (bench_peer, bench_conversion, bench_sharding, bench_anchors, bench_rl),
    )
    return parser


def _add_group(
    commands: Any, name: str, help: str, title: str, modules: Iterable[Any], description: str = ""
) -> None:
    """Add a command that has only sub-commands, each a module."""
    description = description or f"{help[0].upper()}{help[1:]}."
    group = commands.add_parser(name, help=help, description=description)
    metavar = "WAY" if title == "ways" else "NAME"
    subcommands = group.add_subparsers(title=title, metavar=metavar, required=True)
    for module in modules:
        module.add(subcommands)
