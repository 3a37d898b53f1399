"""What a run begins with: its last checkpoint, or parts of others and the rest drawn."""

import dataclasses
import pathlib
from typing import Any

import jax

from blip3o_jax import config as config_lib
from blip3o_jax import lora
from blip3o_jax.config import CheckpointConfig, Config, DataConfig, UserError
from blip3o_jax.parallel.distributed import say
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.checkpoint import Checkpoints, find, read_config, restore_parts, stored_text
from blip3o_jax.train.state import WEIGHTS, StatePlan, TrainState, create_state

PARTS = ("tokenizer", "ar", "connector", "dit", "vae")  # of a whole model


def continued(path: str | pathlib.Path, trained: tuple[str, ...]) -> Config:
    """The configuration to build on for a run of stage joint that starts from a checkpoint: all its
    parts, its text tokenizer, length of rows and sampling, as they are. Parameters of the parts
    `trained` are kept in float32, whatever they were saved in: small steps vanish in bfloat16.
    UserError for what is no checkpoint.
    """
    root, step = find(path)
    given = read_config(root)
    text = stored_text(root, given.model.text)
    editing = {
        "latent_connector": given.model.editing.latents,
        "feature_connector": given.model.editing.features,
    }
    parts = PARTS + tuple(name for name, there in editing.items() if there)
    changes = {
        part: dataclasses.replace(getattr(given.model, part), param_dtype="float32")
        for part in trained
    }
    return Config(
        stage="joint",
        model=dataclasses.replace(given.model, text=text, **changes),
        data=DataConfig(max_length=given.data.max_length),
        sampling=given.sampling,
        checkpoint=CheckpointConfig(
            init_from=tuple((part, str(root / str(step))) for part in parts)
        ),
    )


def restore_or_create(
    config: Config, plan: StatePlan, strategy: Strategy, checkpoints: Checkpoints, image_first: int
) -> tuple[TrainState, Any, int]:
    """(state, position of the data stream or None, steps done), from the newest checkpoint that is
    intact. UserError where the checkpoints are of another stage, or none is intact.
    """
    before = _written_by(checkpoints.directory)
    if before is not None and before.title != config.title and checkpoints.steps():
        raise UserError(
            f"{checkpoints.directory} is of a run of {before.title!r} and cannot go on as one of {config.title!r}: start "
            "in another --workdir, from it by checkpoint.init_from"
        )
    latest = checkpoints.newest_intact(shared=True)
    if latest is not None:
        state, position = checkpoints.restore(latest, plan)
        changed = (
            "; ".join(changed_settings(before, config))
            if before
            else "a config.json, which was missing"
        )
        say(
            f"{config.title}: resuming at step {latest} of {checkpoints.directory}"
            + (f" with {changed}" if changed else "")
        )
        return state, position, latest
    return create_state(config, plan, given_parts(config, plan, strategy), image_first), None, 0


def _written_by(directory: pathlib.Path) -> Config | None:
    return read_config(directory) if (directory / "config.json").exists() else None


def given_parts(config: Config, plan: StatePlan, strategy: Strategy) -> dict[str, Any]:
    """The parts that `checkpoint.init_from` names, as `create_state` takes them."""
    given = {}
    for path in dict.fromkeys(path for _, path in config.checkpoint.init_from):
        parts = tuple(part for part, other in config.checkpoint.init_from if other == path)
        _check_lora(config, parts, path)
        restored = restore_parts(path, strategy, parts)
        given |= {part: fitted(plan, part, restored[part], path) for part in parts}
    return given


def _check_lora(config: Config, parts: tuple[str, ...], path: str) -> None:
    """UserError where parts of a checkpoint have other low-rank factors than this model; it may
    have some that they lack.
    """
    root, _ = find(path)
    theirs, ours = read_config(root).model, config.model
    for part in [part for part in parts if part in lora.PARTS]:
        has, wants = getattr(theirs, part).lora, getattr(ours, part).lora
        if has.rank and has != wants:
            raise UserError(
                f"checkpoint.init_from: part {part} of {path} was trained with {has}, this model has {wants}: set "
                f"model.{part}.lora as there, or merge the factors first (blip3o convert export, then import)"
            )


def fitted(plan: StatePlan, part: str, values: Any, path: str) -> dict[str, Any]:
    """The arrays of one part as the plan wants them: by group, in its own dtypes and shardings.
    They must cover the part, but for low-rank factors, which may all be left to be drawn.
    """
    targets = {
        group: plan.abstract[group][part] for group in WEIGHTS if part in plan.abstract[group]
    }
    named = lambda tree: {
        jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    found = named(values)
    if found.keys() == named(lora.without_factors(values)).keys():
        targets = lora.without_factors(targets)
    if missing := sorted(set().union(*map(named, targets.values())) ^ set(found)):
        raise UserError(
            f"checkpoint.init_from: part {part} of {path} and of this model differ, first in {missing[0]}"
        )

    def put(keys: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
        value = found[jax.tree_util.keystr(keys)]
        if value.shape != target.shape:
            raise UserError(
                f"checkpoint.init_from: {part}{jax.tree_util.keystr(keys)} of {path} has shape {value.shape}, this model's "
                f"{target.shape}: give the run the configuration of that checkpoint"
            )
        return jax.device_put(value.astype(target.dtype), target.sharding)

    return {group: jax.tree_util.tree_map_with_path(put, tree) for group, tree in targets.items()}


def changed_settings(old: Config, new: Config) -> list[str]:
    """["optimizer.learning_rate: 1e-4 -> 5e-5", ...]"""
    before, after = (config_lib.flat(config_lib.to_dict(config)) for config in (old, new))
    return [
        f"{key}: {before.get(key)} -> {after[key]}"
        for key in after
        if before.get(key) != after[key]
    ]
