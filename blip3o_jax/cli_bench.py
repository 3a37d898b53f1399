"""`blip3o bench peer|conversion|sharding|anchors|rl`: parses and calls, nothing else."""

import argparse
import shlex
from collections.abc import Callable
from typing import Any

from blip3o_jax import arguments
from blip3o_jax.config import MeshConfig, SamplingConfig

_NUMBERS = ("rounds", "batch_size", "threads", "jax_devices")


def add(commands: Any, command: Callable) -> None:
    """Adds `bench` to the command line; `command` makes a sub-command (cli.py)."""
    bench = commands.add_parser(
        "bench", help="measure speed and memory", description="Measure speed and memory."
    )
    kinds = bench.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    _add_peer(kinds, command)
    _add_conversion(kinds, command)
    _add_sharding(kinds, command)
    _add_anchors(kinds, command)
    _add_rl(kinds, command)


def _add_peer(kinds: Any, command: Callable) -> None:
    parser = command(
        kinds,
        "peer",
        _peer,
        "the same weights and work in JAX and in PyTorch, in turns",
        "Needs PyTorch (the extra [convert]). Compares what both compute, then times train step, decoding, denoising, "
        "autoencoder, tokenizer and text to image; writes peer.json and peer.md. float32 on a CPU, bfloat16 on a GPU.",
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
        type=arguments.whole(1, 10**6),
        default=7,
        metavar="N",
        help="turns of each side (%(default)s)",
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
        type=arguments.whole(1, 1024),
        default=2,
        metavar="N",
        help="of each side, on a CPU (%(default)s)",
    )
    parser.add_argument(
        "--jax_devices",
        type=arguments.whole(1, 1024),
        default=1,
        metavar="N",
        help="JAX's mesh.cpu_devices, on a CPU (%(default)s)",
    )
    parser.add_argument("--eager_only", action="store_true", help="leave compiled PyTorch out")


def _add_conversion(kinds: Any, command: Callable) -> None:
    parser = command(
        kinds,
        "conversion",
        _conversion,
        "how fast, and in how much memory, weights of a size are imported and exported",
        "Writes random weights of the config's sizes in the published layout, imports and exports them, compares the bits, and "
        "reads and writes the same files with the safetensors library (the extra [convert]). Needs four times their room.",
    )
    parser.add_argument(
        "--config",
        type=arguments.config_path,
        required=True,
        metavar="FILE.py[:ARG]",
        help="a file under configs/, and its argument",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="for conversion.json, and the weights meanwhile",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="(%(default)s)",
    )


def _add_sharding(kinds: Any, command: Callable) -> None:
    parser = command(
        kinds,
        "sharding",
        _sharding,
        "which strategy fits a TPU topology, how fast it should be and what limits it; needs no TPU",
        "Needs libtpu (the extra [tpu]). Compiles the whole train step, or a rollout (text to image), ahead of time for every "
        "topology and strategy and walks the program with a cost model; writes sharding.json and sharding.html. Times are "
        "predicted, not measured. With --measure it runs on the devices that are here, needs no libtpu, and both times stand "
        "side by side. Mesh sizes are chosen for each strategy unless --config.mesh.* sets them; --config.data.cache_dir=X "
        "leaves the encoders out.",
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
        help="of that topology each (%(default)s)",
    )
    parser.add_argument(
        "--strategy",
        type=arguments.names,
        default=(),
        metavar="LIST",
        help="with commas between (fsdp,fsdp_tp,fsdp_sp,dp)",
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
        help="examples, or prompts (the config's batch_size in all); max: as many as the compiler lets pass, which takes "
        "several compiles a row",
    )
    parser.add_argument(
        "--measure",
        type=arguments.whole(1, 10**6),
        nargs="?",
        const=10,
        default=0,
        metavar="N",
        help="in place of --topology: run N steps (10) on the devices that are here, or --config.mesh.cpu_devices",
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
        help="charge matrix products by the compiler's estimates, without having its schedules written: compiles in half to "
        "two thirds of the time, and is less right",
    )


def _sharding(args: argparse.Namespace) -> None:
    from blip3o_jax.bench.sharding import grid
    from blip3o_jax.config import loader

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
    flags = [f"--{name}={_written(getattr(args, name))}" for name in names if getattr(args, name)]
    flags += ["--keep_hlo"] * args.keep_hlo + ["--no_schedules"] * args.no_schedules
    flags += [f"--config.{key}={value}" for key, value in args.overrides]
    command = shlex.join(["blip3o", "bench", "sharding", *flags])
    config = loader.load(args.config, args.overrides)
    report = grid.bench(config, args.out, options, command)
    grid.print_report(report)
    grid.check_any(report)


def _add_anchors(kinds: Any, command: Callable) -> None:
    parser = command(
        kinds,
        "anchors",
        _anchors,
        "the cost model of `bench sharding` against published training steps; needs no TPU",
        "Needs libtpu (the extra [tpu]). Compiles language models of published sizes for the chips that others have timed them "
        "on, and sets the predicted time beside theirs; writes anchors.json.",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where the report is written",
    )
    parser.add_argument(
        "--only",
        type=arguments.names,
        default=(),
        metavar="LIST",
        help="names of anchors, with commas between (all)",
    )
    parser.add_argument(
        "--keep_hlo", action="store_true", help="write each compiled program's text there too"
    )


def _anchors(args: argparse.Namespace) -> None:
    from blip3o_jax.bench.sharding import anchors

    flags = (
        [f"--out={args.out}"]
        + [f"--only={_written(args.only)}"] * bool(args.only)
        + ["--keep_hlo"] * args.keep_hlo
    )
    command = shlex.join(["blip3o", "bench", "anchors", *flags])
    anchors.print_report(anchors.bench(args.out, args.only, command, keep_hlo=args.keep_hlo))


def _add_rl(kinds: Any, command: Callable) -> None:
    parser = command(
        kinds,
        "rl",
        _rl,
        "a step of reinforcement learning by phase, beside the same step as the published code does it",
        "Starts from checkpoint.init_from of the config, and runs on the devices of its mesh. Both ways draw the same images, "
        "in turns, and must learn the same from them; writes rl.json.",
    )
    parser.add_argument(
        "--config",
        type=arguments.config_path,
        required=True,
        metavar="FILE.py[:ARG]",
        help="as configs/rl.py",
    )
    parser.add_argument(
        "--rounds",
        type=arguments.whole(1, 10**6),
        default=7,
        metavar="N",
        help="steps of each way (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where the report is written",
    )


def _rl(args: argparse.Namespace) -> None:
    from blip3o_jax.bench import rl_step
    from blip3o_jax.config import loader

    config = loader.load(args.config, args.overrides)
    flags = [
        f"--config={args.config}",
        *(f"--config.{key}={value}" for key, value in args.overrides),
    ]
    command = shlex.join(
        ["blip3o", "bench", "rl", *flags, f"--rounds={args.rounds}", f"--out={args.out}"]
    )
    rl_step.print_report(rl_step.bench(config, args.out, rounds=args.rounds, command=command))


def _written(value: Any) -> str:
    """Return a flag's value as a command line has it."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _batch(text: str) -> int | str:
    if text == "max":
        return text
    try:
        return arguments.field(SamplingConfig, "batch_size")(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor max") from None


def _conversion(args: argparse.Namespace) -> None:
    from blip3o_jax.bench import conversion
    from blip3o_jax.config import loader

    model = loader.load(args.config, args.overrides).model
    conversion.print_table(conversion.run(model, args.out, dtype=args.dtype))


def _peer(args: argparse.Namespace) -> None:
    from blip3o_jax.bench.peer import report as peer_report
    from blip3o_jax.bench.peer import turns

    options = turns.Options(
        device=args.device,
        rounds=args.rounds,
        batch_size=args.batch_size,
        threads=args.threads,
        jax_devices=args.jax_devices,
        items=args.items or turns.ITEMS,
        compiled=not args.eager_only,
    )
    report = turns.bench(args.torch, args.jax, args.out, options, _command_line(args))
    peer_report.print_report(report)


def _command_line(args: argparse.Namespace) -> str:
    """What to type for the same again."""
    flags = [
        f"--{name}={getattr(args, name)}" for name in ("torch", "jax", "out", "device", *_NUMBERS)
    ]
    flags += [f"--items={_written(args.items)}"] * bool(args.items) + [
        "--eager_only"
    ] * args.eager_only
    return shlex.join(["blip3o", "bench", "peer", *flags])
