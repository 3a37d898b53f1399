"""Train recipes: named stages that run in sequence, each in `workdir`/NAME.

The last stage's checkpoint holds the whole model.
"""

import dataclasses
import functools
import pathlib

from blip3o_jax import checksums
from blip3o_jax.config import Config, UserError
from blip3o_jax.parallel.distributed import log_host0, process_index
from blip3o_jax.train.checkpoint import RECIPE, read_stages
from blip3o_jax.train.loop import Summary
from blip3o_jax.train.supervised import train
from blip3o_jax.train.workdir import WorkdirLock


def run(recipe: dict[str, Config], workdir: str | pathlib.Path) -> dict[str, Summary]:
    """Train every stage that is not finished yet. `checkpoint.init_from` may name an earlier stage
    of the recipe.

    A single configuration, named "", runs in `workdir` itself.
    """
    workdir = pathlib.Path(workdir).absolute()
    names = list(recipe)
    # Before the first stage: the run of a later one may be hours away.
    for position, config in enumerate(recipe.values()):
        for part, source in config.checkpoint.init_from:
            if source not in names[:position] and not pathlib.Path(source).exists():
                raise UserError(
                    f"checkpoint.init_from: {part} comes from {source}, which is no directory and"
                    " no earlier stage"
                )
    if names == [""]:
        return {"": train(recipe[""], workdir)}
    summaries = {}
    with WorkdirLock(workdir) as lock:
        _check_stages(workdir, names)
        for number, (name, config) in enumerate(recipe.items(), 1):
            begin = functools.partial(_begin, workdir, names, lock)
            summaries[name] = train(
                _resolved(config, names, workdir),
                workdir / name,
                on_begin=begin,
                place=f"{number}/{len(names)}",
            )
    return summaries


def _check_stages(workdir: pathlib.Path, names: list[str]) -> None:
    """Raise UserError where recipe.json cannot be read or `workdir` is that of a single run, whose
    checkpoints nothing would find any more; log stages that differ from those of recipe.json.
    """
    if (workdir / "checkpoints").exists():
        raise UserError(
            f"{workdir}/checkpoints is of a single run: start a recipe in another --workdir"
        )
    if not (workdir / RECIPE).exists():
        return
    try:
        before = read_stages(workdir)
    except checksums.DamagedFile as error:
        raise UserError(f"{error}, or remove it: the run writes it again") from error
    if before != names:
        log_host0(f"{workdir / RECIPE}: stages {', '.join(before)} -> {', '.join(names)}")


def _begin(workdir: pathlib.Path, names: list[str], lock: WorkdirLock) -> None:
    """Name the stages in recipe.json, once the checks of the first stage have passed."""
    lock.begun = True
    if process_index() == 0:
        checksums.write_json(workdir / RECIPE, {"stages": names})


def _resolved(config: Config, names: list[str], workdir: pathlib.Path) -> Config:
    init_from = tuple(
        (part, str(workdir / source) if source in names else source)
        for part, source in config.checkpoint.init_from
    )
    return dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, init_from=init_from)
    )
