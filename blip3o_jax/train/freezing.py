"""Select the parameters of a run that are trained; all others are frozen."""

import re
from collections.abc import Callable

from blip3o_jax.config import Config
from blip3o_jax.part_registry import family_of
from blip3o_jax.train.stages import STAGES, stage_parts


def stage_trainable(config: Config) -> tuple[str, ...]:
    """Return the stage's default patterns of trainable parameters.

    With reference slots they include the connectors of references and, for concatenated latents,
    the DiT's input and output layers (BLIP3o-NEXT, arXiv 2510.15857, sec. 4).
    """
    editing, patterns = config.model.editing, STAGES[config.stage].trainable
    if config.stage != "joint" or not editing.reference_slots:
        return patterns
    wider_map = ("dit/patch_embed/.*", "dit/proj_out/.*") if editing.latent_concat else ()
    return (
        patterns
        + tuple(f"{part}/.*" for part in stage_parts(config) if part.endswith("_connector"))
        + wider_map
    )


def trainable_filter(config: Config) -> Callable[[str], bool]:
    """Return whether the parameter of a path name ("ar/layers/...") is trained: one that matches
    `trainable`, or without it one of the stage's that no family holds constant (part_registry.py).
    """
    compiled = [re.compile(p) for p in config.trainable or stage_trainable(config)]
    constant: set[str] = set()
    if not config.trainable:
        for part in stage_parts(config):
            constant |= {f"{part}/{path}" for path in family_of(part, config.model).constant}
    # `fullmatch`: a pattern that names a layer must not select another with the same beginning.
    return lambda name: name not in constant and any(p.fullmatch(name) for p in compiled)
