"""Run a command on every host of a job."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip3o_jax import files


def on_all_hosts(
    args: argparse.Namespace, stages: dict[str, Any], run: Callable[[Path], None]
) -> int:
    """Call `run` with the working directory on every host, after checking their consistency."""
    from blip3o_jax import config
    from blip3o_jax.parallel import distributed

    workdir = args.workdir or default_workdir(args.config)
    launch = distributed.Launch(
        args.distributed, args.coordinator, args.num_processes, args.process_id
    )

    def job() -> None:
        # Before the first collective: hosts with other settings would compile other programs, and
        # each would wait for the others without an end.
        distributed.check_consistent(
            {name: config.to_dict(stage) for name, stage in stages.items()}, workdir.absolute()
        )
        # An error of writing to an open file gets the name of the directory.
        with files.writing(workdir):
            run(workdir)

    return distributed.run(launch, job)


def default_workdir(config: str) -> Path:
    """Return the working directory that the name of a configuration implies.

    It is runs/pretrain-1.7b for configs/pretrain.py:1.7b, runs/finetune-mine for
    configs/finetune.py:checkpoints/mine, runs/rl-ocr-mine for configs/rl.py:ocr:checkpoints/mine.
    """
    path, _, argument = config.partition(".py:")
    names = (
        Path(path).name.removesuffix(".py"),
        *(Path(piece).name for piece in argument.split(":")),
    )
    return Path("runs") / "-".join(name for name in names if name)
