"""Restore or create the initial train state of a run: from its newest checkpoint, or from parts of
other checkpoints and random weights.
"""

import dataclasses
import pathlib
from typing import Any, cast

import jax

from blip3o_jax import config as config_lib
from blip3o_jax import lora
from blip3o_jax.config import CheckpointConfig, Config, DataConfig, Part, UserError
from blip3o_jax.parallel.distributed import log_host0
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.checkpoint import Checkpoints, find, read_config, restore_parts, stored_text
from blip3o_jax.train.checkpoint_steps import all_steps
from blip3o_jax.train.stages import STAGES
from blip3o_jax.train.state import WEIGHTS, StatePlan, TrainState, create_state


def from_checkpoint(path: str | pathlib.Path, trained: tuple[str, ...]) -> Config:
    """Return the configuration of a joint-stage run that starts from a checkpoint: the checkpoint's
    model, text tokenizer, row length and sampling settings.

    Parameters of the parts `trained` are float32 whatever their saved dtype, because small updates
    vanish in bfloat16. Raises UserError if `path` is not a checkpoint.
    """
    root, step = find(path)
    saved = read_config(root)
    text = stored_text(root, saved.model.text)
    connectors = {
        "latent_connector": saved.model.editing.latents,
        "feature_connector": saved.model.editing.features,
    }
    enabled = tuple(name for name, on in connectors.items() if on)
    parts = STAGES["joint"].parts + enabled
    changes = {
        part: dataclasses.replace(getattr(saved.model, part), param_dtype="float32")
        for part in trained
    }
    return Config(
        stage="joint",
        model=dataclasses.replace(saved.model, text=text, **changes),
        data=DataConfig(max_length=saved.data.max_length),
        sampling=saved.sampling,
        checkpoint=CheckpointConfig(
            init_from=tuple((cast("Part", part), str(root / str(step))) for part in parts)
        ),
    )


def restore_or_create(
    config: Config,
    plan: StatePlan,
    strategy: Strategy,
    checkpoints: Checkpoints,
    image_token_offset: int,
) -> tuple[TrainState, Any, int]:
    """Return (state, position of the data stream or None, steps done) from the newest intact
    checkpoint, or a new state at step 0.

    Raises UserError if the checkpoints are of another stage or none of them is intact.
    """
    before = _written_by(checkpoints.directory)
    if before is not None and before.title != config.title and checkpoints.steps():
        raise UserError(
            f"{checkpoints.directory} is of a run of {before.title!r} and cannot go on as one of"
            f" {config.title!r}: start in another --workdir, from it by checkpoint.init_from"
        )
    latest = checkpoints.newest_intact(shared=True)
    if latest is not None:
        state, position = checkpoints.restore(latest, plan)
        changed = (
            "; ".join(changed_settings(before, config))
            if before
            else "a config.json, which was missing"
        )
        log_host0(
            f"{config.title}: resuming at step {latest} of {checkpoints.directory}"
            + (f" with {changed}" if changed else "")
        )
        return state, position, latest
    return (
        create_state(config, plan, restore_init_parts(config, plan, strategy), image_token_offset),
        None,
        0,
    )


def _written_by(directory: pathlib.Path) -> Config | None:
    return read_config(directory) if (directory / "config.json").exists() else None


def saved_row_length(directory: pathlib.Path) -> int:
    """Return `data.max_length` of the run whose checkpoints lie in `directory`; 0 if it has saved
    no step, so that other data may be given.
    """
    before = _written_by(directory) if all_steps(directory) else None
    return before.data.max_length if before else 0


def restore_init_parts(config: Config, plan: StatePlan, strategy: Strategy) -> dict[str, Any]:
    """Restore the parts that `checkpoint.init_from` names, in the form `create_state` takes."""
    restored_parts: dict[str, Any] = {}
    for path in dict.fromkeys(path for _, path in config.checkpoint.init_from):
        parts = tuple(part for part, other in config.checkpoint.init_from if other == path)
        _check_lora(config, parts, path)
        restored = restore_parts(path, strategy, parts)
        restored_parts |= {part: match_to_plan(plan, part, restored[part], path) for part in parts}
    return restored_parts


def _check_lora(config: Config, parts: tuple[str, ...], path: str) -> None:
    """Raise UserError if parts of a checkpoint have LoRA factors that differ from this model's.
    Factors that the checkpoint lacks are allowed.
    """
    root, _ = find(path)
    theirs = read_config(root).model
    ours = config.model
    for part in [part for part in parts if part in lora.LORA_PARTS]:
        saved = getattr(theirs, part).lora
        configured = getattr(ours, part).lora
        if saved.rank and saved != configured:
            raise UserError(
                f"checkpoint.init_from: part {part} of {path} was trained with {saved}, this model"
                f" has {configured}: set model.{part}.lora as there, or merge the factors first"
                " (blip3o convert export, then import)"
            )


def match_to_plan(plan: StatePlan, part: str, values: Any, path: str) -> dict[str, Any]:
    """Return the arrays of one part by group, cast and sharded as the plan has them.

    They must cover the part; only its LoRA factors may be absent, all at once, and are then
    initialized at random.
    """
    targets = {
        group: plan.abstract[group][part] for group in WEIGHTS if part in plan.abstract[group]
    }
    named = lambda tree: {
        jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    found = named(values)
    # The checkpoint has no factors: the targets' factors are then initialised by `create_state`.
    if found.keys() == named(lora.drop_factors(values)).keys():
        targets = lora.drop_factors(targets)
    if missing := sorted(set().union(*map(named, targets.values())) ^ set(found)):
        raise UserError(
            f"checkpoint.init_from: part {part} of {path} and of this model differ, first in"
            f" {missing[0]}"
        )

    def put(keys: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
        value = found[jax.tree_util.keystr(keys)]
        if value.shape != target.shape:
            raise UserError(
                f"checkpoint.init_from: {part}{jax.tree_util.keystr(keys)} of {path} has shape"
                f" {value.shape}, this model's {target.shape}: give the run the configuration of"
                " that checkpoint"
            )
        return jax.device_put(value.astype(target.dtype), target.sharding)

    return {group: jax.tree_util.tree_map_with_path(put, tree) for group, tree in targets.items()}


def changed_settings(old: Config, new: Config) -> list[str]:
    """Return the settings that differ: ["optimizer.learning_rate: 1e-4 -> 5e-5", ...]."""
    before, after = (config_lib.flat(config_lib.to_dict(config)) for config in (old, new))
    return [
        f"{key}: {before.get(key)} -> {after[key]}"
        for key in after
        if before.get(key) != after[key]
    ]
