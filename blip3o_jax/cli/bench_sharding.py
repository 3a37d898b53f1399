"""Run `blip3o bench sharding`."""

import argparse
import shlex
from typing import Any

from blip3o_jax.cli import arguments, flags, settings
from blip3o_jax.cli.command import add_command
from blip3o_jax.config import MeshConfig, SamplingConfig


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "sharding",
        run,
        "predict which strategies fit a TPU topology, their speed and bottleneck; needs no TPU",
        "Needs libtpu (the extra [tpu]). Compiles the whole train step, or a rollout (text to"
        " image), ahead of time for every topology and strategy and walks the program with a cost"
        " model; writes sharding.json and sharding.html. Times are predicted, not measured. With"
        " --measure it also runs on this machine's devices, without libtpu, and reports both"
        " times. The mesh is that of a run with the strategy: chosen where --config.mesh.* leaves"
        " it open;"
        " --config.data.cache_dir=X leaves the encoders out.",
    )
    parser.add_argument(
        "--config",
        type=arguments.config_path,
        required=True,
        metavar="FILE.py[:ARG]",
        help="a file under configs/, and its argument",
    )
    parser.add_argument(
        "--topology",
        type=arguments.names,
        default=(),
        metavar="LIST",
        help="chips along each axis: v5p:8x8x8,v6e:16x16",
    )
    parser.add_argument(
        "--slices",
        type=arguments.field(MeshConfig, "slices"),
        default=1,
        metavar="N",
        help="number of slices of each topology (%(default)s)",
    )
    parser.add_argument(
        "--strategy",
        type=arguments.names,
        default=(),
        metavar="LIST",
        help="strategies, separated by commas (fsdp,fsdp_tp,fsdp_sp,dp)",
    )
    parser.add_argument(
        "--step",
        type=arguments.text,
        default="train",
        metavar="train|rollout",
        help="what is compiled (%(default)s)",
    )
    parser.add_argument(
        "--batch_per_chip",
        type=_batch,
        metavar="N|max",
        help=(
            "examples, or prompts (by default the config's batch_size in total); max: the most that"
            " the compiler accepts, found by several compiles a row"
        ),
    )
    parser.add_argument(
        "--measure",
        type=arguments.integer(1, 10**6),
        nargs="?",
        const=10,
        default=0,
        metavar="N",
        help=(
            "in place of --topology: run N steps (10) on this machine's devices, or"
            " --config.mesh.cpu_devices"
        ),
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where the report is written",
    )
    parser.add_argument(
        "--keep_hlo", action="store_true", help="write each compiled program's text there too"
    )
    parser.add_argument(
        "--no_schedules",
        action="store_true",
        help=(
            "cost matrix products by the compiler's estimates instead of its schedules: compiles in"
            " half to two thirds of the time, and is less accurate"
        ),
    )


def run(args: argparse.Namespace) -> None:
    from blip3o_jax.bench.sharding import grid

    options = grid.Options(
        topologies=args.topology,
        strategies=args.strategy or grid.STRATEGIES,
        slices=args.slices,
        batch_per_chip=None if args.batch_per_chip == "max" else args.batch_per_chip,
        largest_batch=args.batch_per_chip == "max",
        step=args.step,
        measure=args.measure,
        chosen=frozenset(
            key.split("mesh.", 1)[1]
            for key, _ in args.overrides
            if key.startswith("mesh.") or ".mesh." in key
        ),
        keep_hlo=args.keep_hlo,
        schedules=not args.no_schedules,
    )
    names = ("config", "topology", "slices", "strategy", "step", "batch_per_chip", "measure", "out")
    typed = [
        f"--{name}={flags.format_value(getattr(args, name))}"
        for name in names
        if getattr(args, name)
    ]
    typed += ["--keep_hlo"] * args.keep_hlo + ["--no_schedules"] * args.no_schedules
    typed += [f"--config.{key}={value}" for key, value in args.overrides]
    command = shlex.join(["blip3o", "bench", "sharding", *typed])
    config = settings.load(args)
    report = grid.bench(config, args.out, options, command)
    grid.print_report(report)
    grid.check_any(report)


def _batch(text: str) -> int | str:
    if text == "max":
        return text
    try:
        return arguments.field(SamplingConfig, "batch_size")(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor max") from None
