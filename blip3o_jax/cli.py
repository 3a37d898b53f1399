"""`blip3o <command>`: parses and calls, nothing else.

No command imports jax before it runs, so that help answers at once. An error a user can cause ends
with one line on stderr and status 2 (BLIP3O_TRACEBACK=1 shows where it was raised); any other
exception is a bug and keeps its traceback.
"""

import argparse
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from blip3o_jax import __version__, arguments, cli_bench, cli_convert, cli_rl, exits, files
from blip3o_jax.config import SamplingConfig, UserError
from blip3o_jax.config.fields import INT32, UINT32, escaped, shown

_SAMPLING = (
    "steps",
    "guidance",
    "reference_guidance",
    "token_guidance",
    "temperature",
    "top_k",
    "top_p",
    "batch_size",
)

_SEED = arguments.whole(0, UINT32)
_RECORDS = arguments.whole(1, 10**8)

_EXAMPLES = """\
examples:
  blip3o demo                                             train everything on 2 cores and look at the report
  blip3o data shapes --out=data/shapes                    draw the embedded data set
  blip3o train --config=configs/overfit.py --workdir=runs/mine --config.data.path=photos.tar
  blip3o sample --checkpoint=runs/mine --prompt="a red circle" --out=samples
  blip3o edit --checkpoint=runs/mine --image=photo.png --instruction="make the sky green" --out=edited
  blip3o evaluate --checkpoint=runs/mine --suite=shapes --out=scores
  blip3o params --config=configs/pretrain.py:1.7b         how large each part is
  blip3o convert import --source=BLIP3o-NEXT --diffusion=SANA --out=checkpoint

blip3o COMMAND --help tells more. BLIP3O_TRACEBACK=1 adds the traceback to an error's line.
"""


class _Parser(argparse.ArgumentParser):
    """Refuses bad arguments with one line, where argparse would print the usage too."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"blip3o: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit status: 0, 1 (a comparison failed), 2 (a user's
    error), 75 (stopped by SIGTERM; run it again), 130 (Ctrl-C), 137 (another host was lost; run it
    again), 141 (nobody reads the output).
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    exits.process.report = lambda error: _report(error, args)
    exits.process.again = args.after_interrupt
    if args.run in (_train, _rl):
        exits.listen_for_stop(
            f"stopped by SIGTERM, with nothing to save yet; {args.after_interrupt}"
        )
    try:
        _check_out(args)
        return args.run(args) or 0
    except BaseException as error:
        status = exits.process.tell(error)
        if status is None:
            raise
        return status


def _report(error: BaseException, args: argparse.Namespace) -> int | None:
    """Tells a user's error, a signal or a lost host in one line and returns the exit status; None
    for a bug.
    """
    if isinstance(error, KeyboardInterrupt):
        exits.process.print_line(f"blip3o: interrupted; {args.after_interrupt}")
        return exits.INTERRUPTED
    if exits.is_broken_pipe(error):
        return exits.BROKEN_PIPE
    if isinstance(error, exits.Ended):
        exits.process.print_line(f"blip3o: {_one_line(error)}")
        return error.status
    line = _line(error, args)
    if line is None:
        return None
    if os.environ.get("BLIP3O_TRACEBACK") == "1":
        traceback.print_exception(error)
    exits.process.print_line(f"blip3o: error: {line}")
    return exits.USER_ERROR


def _line(error: BaseException, args: argparse.Namespace) -> str | None:
    """What is wrong and what to do, where a user can cause it."""
    if isinstance(error, UserError):
        return _one_line(error)
    if line := exits.stdout_line(error):
        return line
    found = files.system_error(error)
    if found is None:
        return None
    if found.filename is None and getattr(args, "out", None):
        found.filename = str(args.out)
    return escaped(files.describe(found)) + (
        f"; {args.after_interrupt}" if found.errno in files.TROUBLE else ""
    )


def _check_out(args: argparse.Namespace) -> None:
    """Where output goes is looked at before anything is computed."""
    if getattr(args, "out", None) is not None:
        (files.check_out_file if args.out_is_file else files.check_out_directory)(args.out)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one command: `run` is what to call with them, `overrides` the (field, text) of
    each --config.field=text.
    """
    parser = build_parser()
    # argparse never sees them: where a command has sub-commands it takes an unknown --x="a b" for
    # one.
    overrides = [flag for flag in argv if flag.startswith("--config.")]
    args, unknown = parser.parse_known_args(
        [flag for flag in argv if not flag.startswith("--config.")]
    )
    if bare := [flag for flag in overrides if "=" not in flag]:
        parser.error(f"{_quoted(bare[0])} needs a value: {_quoted(bare[0])}=VALUE")
    if unknown:
        parser.error(f"unrecognized argument: {_quoted(unknown[0])}")
    for flag in args.flags_of_a_run:
        if getattr(args, flag.dest) != flag.default:
            parser.error(
                f"{flag.option_strings[0]} is for a run of rl and does nothing here: leave it out"
            )
    if overrides and (args.flags_of_a_run or not hasattr(args, "config")):
        parser.error(f"unrecognized argument: {_quoted(overrides[0])}")
    pairs = (flag.removeprefix("--config.").partition("=") for flag in overrides)
    args.overrides = [(key, value) for key, _, value in pairs]
    return args


def _quoted(flag: str) -> str:
    """Return the flag on one line, without quotes around it."""
    return shown(flag)[1:-1]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; builds without importing jax."""
    parser = _Parser(
        prog="blip3o",
        description="BLIP3o-NEXT: train it, sample from it, measure it.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"blip3o_jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_data,
        _add_train,
        _add_sample,
        _add_edit,
        _add_reconstruct,
        _add_ask,
        _add_evaluate,
        _add_params,
        _add_demo,
    ):
        add(commands)
    cli_rl.add(commands, _command, _add_hosts, _rl)
    cli_convert.add(commands, _command)
    cli_bench.add(commands, _command)
    return parser


def _command(
    commands: Any, name: str, run: Callable, help: str, description: str = "", again: str = ""
) -> _Parser:
    description = textwrap.fill(f"{help[0].upper()}{help[1:]}. {description}", 100)
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(
        run=run, after_interrupt=again or "run the same command again to start over"
    )
    parser.set_defaults(flags_of_a_run=(), out_is_file=False)
    return parser


def _sampling(name: str) -> arguments.Argument:
    return arguments.field(SamplingConfig, name)


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="prepare a data set", description="Prepare a data set.")
    sets = data.add_subparsers(title="data sets", metavar="NAME", required=True)
    parser = _command(
        sets,
        "shapes",
        _shapes,
        "draw the embedded compositional data set",
        "Scenes of coloured shapes with captions, written as ArrayRecord files. The test split holds combinations that the "
        "training split never shows.",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where the data set is written",
    )
    parser.add_argument(
        "--num_train",
        type=_RECORDS,
        default=20000,
        metavar="N",
        help="training scenes (%(default)s)",
    )
    parser.add_argument(
        "--num_validation",
        type=_RECORDS,
        default=500,
        metavar="N",
        help="validation scenes (%(default)s)",
    )
    parser.add_argument(
        "--num_test", type=_RECORDS, default=2000, metavar="N", help="held-out scenes (%(default)s)"
    )
    parser.add_argument(
        "--num_edits",
        type=arguments.whole(0, 10**8),
        default=0,
        metavar="N",
        help="training edits, in a tar file (%(default)s)",
    )
    parser.add_argument(
        "--num_questions",
        type=arguments.whole(0, 10**8),
        default=0,
        metavar="N",
        help="training questions (%(default)s)",
    )
    parser.add_argument(
        "--image_size",
        type=arguments.whole(32, 4096),
        default=64,
        metavar="PIXELS",
        help="side of an image (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=_SEED, default=0, help="the same seed draws the same scenes (%(default)s)"
    )
    _add_index(sets)


def _add_index(commands: Any) -> None:
    parser = _command(
        commands,
        "index",
        _index,
        "read a data set once and keep checksums of its records",
        "Done by itself when a run opens a set for the first time; a large one is better indexed before. Reads the shards "
        "that have no index, and those whose size or time of change is another; prints what the set holds.",
        again="the same command goes on with the shards that have no index yet",
    )
    parser.add_argument("path", type=arguments.text, metavar="PATH", help="as data.path")
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


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=arguments.config_path,
        required=True,
        metavar="FILE.py[:ARG]",
        help="a file under configs/, and its argument",
    )
    parser.epilog = (
        "any field of the config can be set, and a later flag wins:\n"
        "  --config.optimizer.learning_rate=1e-4  --config.data.path=photos.tar\n"
        "  --config.trainable=\"('ar/.*', 'connector/.*')\""
    )


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train what a config file says: one stage, or several in order",
        "Resumes from the last checkpoint in the working directory; stages that are finished are not run again.",
        again="the same command resumes from the last checkpoint in its --workdir",
    )
    _add_config(parser)
    parser.add_argument(
        "--workdir",
        type=arguments.path,
        metavar="DIR",
        help="for checkpoints, metrics (runs/NAME of the config)",
    )
    parser.add_argument(
        "--compile_cache",
        type=arguments.path,
        metavar="DIR",
        help="keeps compiled programs for the next start",
    )
    _add_hosts(parser)


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many hosts", "one process each; docs/pods.md tells how to launch them"
    )
    group.add_argument(
        "--distributed",
        choices=("auto", "off", "tpu", "slurm"),
        default="auto",
        help="how hosts find each other: by a TPU slice's metadata, Slurm's variables, or what there is of these (%(default)s)",
    )
    group.add_argument(
        "--coordinator",
        type=arguments.address,
        metavar="HOST:PORT",
        help="where host 0 listens, in place of --distributed",
    )
    group.add_argument(
        "--num_processes",
        type=arguments.whole(1, 2**20),
        metavar="N",
        help="with --coordinator: how many hosts",
    )
    group.add_argument(
        "--process_id",
        type=arguments.whole(0, 2**20),
        metavar="I",
        help="with --coordinator: which of them this is, from 0",
    )


def _add_sample(commands: Any) -> None:
    parser = _command(
        commands,
        "sample",
        _sample,
        "draw images for prompts",
        "Writes one PNG a prompt and a labelled grid. The same prompt and seed give the same image at any batch size.",
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="a working directory or checkpoint",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        type=arguments.text,
        action="append",
        metavar="TEXT",
        help="what to draw; repeat it for more images",
    )
    prompts.add_argument(
        "--prompts_file",
        type=arguments.path,
        metavar="FILE",
        help="one prompt a line, or JSON lines",
    )
    _add_drawing(parser)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="for the images, in place of an earlier run's",
    )
    parser.add_argument(
        "--size",
        type=arguments.size,
        metavar="HxW",
        help="pixels (nearest to the image given, of the model's sizes)",
    )
    parser.add_argument("--seed", type=_SEED, default=0, help="(%(default)s)")
    group = parser.add_argument_group(
        "sampling", "each defaults to what the checkpoint's config says"
    )
    group.add_argument("--steps", type=_sampling("steps"), metavar="N", help="denoising steps")
    group.add_argument(
        "--guidance",
        type=_sampling("guidance"),
        metavar="SCALE",
        help="classifier-free guidance; 1 turns it off",
    )
    group.add_argument(
        "--reference_guidance",
        type=_sampling("reference_guidance"),
        metavar="SCALE",
        help="that towards the images given; 0: the same",
    )
    group.add_argument(
        "--token_guidance",
        type=_sampling("token_guidance"),
        metavar="SCALE",
        help="the same, of the image tokens",
    )
    group.add_argument(
        "--temperature", type=_sampling("temperature"), metavar="T", help="of the image tokens"
    )
    group.add_argument(
        "--top_k", type=_sampling("top_k"), metavar="K", help="image tokens kept at each position"
    )
    group.add_argument(
        "--top_p",
        type=_sampling("top_p"),
        metavar="P",
        help="probability mass kept at each position",
    )
    group.add_argument(
        "--batch_size", type=_sampling("batch_size"), metavar="N", help="images drawn at once"
    )


def _add_edit(commands: Any) -> None:
    parser = _command(
        commands,
        "edit",
        _edit,
        "change an image as an instruction says",
        "For a checkpoint that was trained to be shown images (model.editing).",
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="a working directory or checkpoint",
    )
    parser.add_argument(
        "--image",
        type=arguments.path,
        action="append",
        required=True,
        help="what is edited; repeat it for several at once",
    )
    parser.add_argument(
        "--instruction",
        type=arguments.text,
        required=True,
        metavar="TEXT",
        help="what is to be done",
    )
    _add_drawing(parser)


def _add_reconstruct(commands: Any) -> None:
    parser = _command(
        commands,
        "reconstruct",
        _reconstruct,
        "draw images again from their tokens",
        "Shows what the model keeps of an image that it is shown.",
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="a working directory or checkpoint",
    )
    parser.add_argument(
        "--image",
        type=arguments.path,
        action="append",
        required=True,
        help="repeat it for more images",
    )
    _add_drawing(parser)


def _add_ask(commands: Any) -> None:
    parser = _command(
        commands,
        "ask",
        _ask,
        "answer a question about an image",
        "Prints the answer. For a checkpoint that was trained to be shown images (model.editing).",
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="a working directory or checkpoint",
    )
    parser.add_argument(
        "--image",
        type=arguments.path,
        action="append",
        required=True,
        help="repeat it for a question about several",
    )
    parser.add_argument("--question", type=arguments.text, required=True, metavar="TEXT")
    parser.add_argument(
        "--temperature",
        type=_sampling("temperature"),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest words (%(default)s)",
    )
    parser.add_argument(
        "--most",
        type=arguments.whole(1, 2**20),
        default=64,
        metavar="N",
        help="tokens of an answer, or fewer (%(default)s)",
    )
    parser.add_argument("--seed", type=_SEED, default=0, help="(%(default)s)")


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "score a checkpoint on held-out prompts",
        "Writes scores.json, per category and overall, and the images that were judged. shapes, shapes_edit, shapes_qa and "
        "reconstruct have held-out prompts of their own; any reward of docs/rl.md (ocr, "
        "geneval,detector=transformers,path=DIR) is a suite for a file of prompts.",
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="a working directory or checkpoint",
    )
    parser.add_argument(
        "--suite",
        type=arguments.word,
        required=True,
        metavar="NAME[,OPTION=VALUE]",
        help="a suite of its own, or a reward and its options",
    )
    parser.add_argument(
        "--prompts_file",
        type=arguments.path,
        metavar="FILE",
        help="for a reward: as rl.prompts_file",
    )
    parser.add_argument(
        "--images_per_prompt",
        type=arguments.whole(1, 2**16),
        default=1,
        metavar="N",
        help="for a reward (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        metavar="DIR",
        help="where scores and images are written",
    )
    parser.add_argument(
        "--num_prompts",
        type=arguments.whole(1, INT32),
        metavar="N",
        help="the first of them (of a suite's own 300, of a file all)",
    )
    parser.add_argument("--seed", type=_SEED, default=0, help="(%(default)s)")
    parser.add_argument(
        "--batch_size",
        type=_sampling("batch_size"),
        metavar="N",
        help="prompts drawn at once (the checkpoint's config)",
    )


def _add_params(commands: Any) -> None:
    parser = _command(
        commands,
        "params",
        _params,
        "print the parameters of each part of a model",
        "Builds the model abstractly: the largest sizes answer on a laptop.",
    )
    _add_config(parser)


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "train every part from random weights, sample, score, report",
        "Makes its own data and needs no accelerator. Its last line is one JSON object with the score, the seconds it took "
        "and the path of the report.",
    )
    parser.add_argument(
        "--workdir",
        type=arguments.path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a smoke run: every step of the way, too short to learn much",
    )


def _shapes(args: argparse.Namespace) -> None:
    from blip3o_jax.data.shapes import builder

    directory = builder.prepare(
        args.out,
        num_train=args.num_train,
        num_validation=args.num_validation,
        num_test=args.num_test,
        image_size=args.image_size,
        seed=args.seed,
    )
    if args.num_edits or args.num_questions:
        from blip3o_jax.data.shapes import tasks

        counts = {"num_edits": args.num_edits, "num_questions": args.num_questions}
        tasks.prepare(directory, **counts, image_size=args.image_size, seed=args.seed)


def _index(args: argparse.Namespace) -> None:
    from blip3o_jax.config import SourceConfig
    from blip3o_jax.data.index_builder import ALL, CHANGED
    from blip3o_jax.data.sources import open_source

    cfg = SourceConfig(args.path, args.format, split=args.split, images=args.images)
    source = open_source(cfg, rebuild=ALL if args.all else CHANGED)
    for note in source.notes:
        print(note)
    print(f"{source.name}: {len(source)} records, digest {source.fingerprint}")
    if not args.all:
        print("shards of the same size and time of change were not read again; --all reads them")


def _train(args: argparse.Namespace) -> int:
    from blip3o_jax.config import loader

    stages = loader.load_recipe(args.config, args.overrides)

    def run(workdir: Path) -> None:
        from blip3o_jax.train import recipe

        recipe.run(stages, workdir)

    return _on_all_hosts(args, stages, run)


def _rl(args: argparse.Namespace) -> int:
    from blip3o_jax.config import loader

    if not args.config:
        raise UserError(
            "rl: --config names no file: --config=configs/rl.py:ocr:CHECKPOINT, or rl serve-rewards"
        )
    config = loader.load(args.config, args.overrides)

    def run(workdir: Path) -> None:
        from blip3o_jax.rl import method

        method.run(config, workdir)

    return _on_all_hosts(args, {"": config}, run)


def _on_all_hosts(
    args: argparse.Namespace, stages: dict[str, Any], run: Callable[[Path], None]
) -> int:
    """`run`, with the working directory, on every host of the job, once they agree on what it is."""
    from blip3o_jax import config
    from blip3o_jax.parallel import distributed

    workdir = args.workdir or _default_workdir(args.config)
    launch = distributed.Launch(
        args.distributed, args.coordinator, args.num_processes, args.process_id
    )

    def job() -> None:
        distributed.agree(
            {name: config.to_dict(stage) for name, stage in stages.items()}, workdir.absolute()
        )
        with files.writing(workdir):
            run(workdir)

    distributed.keep_programs(args.compile_cache)
    return distributed.run(launch, job)


def _sample(args: argparse.Namespace) -> None:
    from blip3o_jax.data.prompts import read_prompts

    prompts = args.prompt or [prompt.text for prompt in read_prompts(args.prompts_file)]
    _draw(args, [("t2i", prompt, ()) for prompt in prompts])


def _edit(args: argparse.Namespace) -> None:
    _draw(args, [("edit", args.instruction, tuple(args.image))])


def _reconstruct(args: argparse.Namespace) -> None:
    _draw(args, [("reconstruct", "", (path,)) for path in args.image])


def _draw(args: argparse.Namespace, requests: list[tuple[str, str, tuple[Path, ...]]]) -> None:
    """(task, text, images) each."""
    from blip3o_jax.data import images

    given = [
        (task, text, tuple(map(images.load, paths)), args.size) for task, text, paths in requests
    ]
    overrides = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    from blip3o_jax import pipeline

    pipeline.draw_to_directory(
        args.checkpoint, given, args.out, seed=args.seed, overrides=overrides
    )


def _ask(args: argparse.Namespace) -> None:
    from blip3o_jax.data import images

    shown = [images.load(path) for path in args.image]
    from blip3o_jax import pipeline

    model = pipeline.load(args.checkpoint)
    settings = {
        "temperature": args.temperature,
        "most": args.most,
        "seed": args.seed,
        "batch_size": 1,
    }
    print(*model.ask([shown], [args.question], **settings))


def _evaluate(args: argparse.Namespace) -> None:
    from blip3o_jax.evaluation import runner

    runner.evaluate(
        args.checkpoint,
        args.suite,
        args.out,
        num_prompts=args.num_prompts,
        seed=args.seed,
        prompts_file=args.prompts_file,
        images_per_prompt=args.images_per_prompt,
        batch_size=args.batch_size,
    )


def _params(args: argparse.Namespace) -> None:
    from blip3o_jax import model_table
    from blip3o_jax.config import loader

    model_table.print_table(loader.load(args.config, args.overrides))


def _demo(args: argparse.Namespace) -> None:
    from blip3o_jax.demo.run import run

    summary = run(args.workdir, fast=args.fast)
    print(json.dumps(summary), flush=True)


def _default_workdir(config: str) -> Path:
    """runs/pretrain-1.7b for configs/pretrain.py:1.7b, runs/finetune-mine for
    configs/finetune.py:checkpoints/mine, runs/rl-ocr-mine for configs/rl.py:ocr:checkpoints/mine.
    """
    path, _, argument = config.partition(".py:")
    names = (
        Path(path).name.removesuffix(".py"),
        *(Path(piece).name for piece in argument.split(":")),
    )
    return Path("runs") / "-".join(name for name in names if name)


def _one_line(error: BaseException) -> str:
    return escaped(" ".join(str(error).split()))
