"""Settings of sampling: image tokens and latents."""

import dataclasses
from typing import Annotated

from blip3o_jax.config.constraints import Bounds
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.types import BatchSize, Count

Guidance = Annotated[float, Bounds(-1000, 1000)]


@dataclasses.dataclass(frozen=True)
class SamplingConfig(ConfigGroup, path="sampling"):
    """Set how image tokens are sampled, and how the diffusion head integrates and guides."""

    temperature: Annotated[float, Bounds(0, 1000)] = 1.0
    """Temperature of the image tokens; 0 takes the likeliest."""
    top_k: Count = 1200
    """Likeliest image tokens that are sampled from at each position; 0 samples from all."""
    top_p: Annotated[float, Bounds(0, 1, open_low=True, note="1 switches it off")] = 0.95
    """Probability mass of the likeliest image tokens that are sampled from at each position."""
    steps: Annotated[int, Bounds(1, 10_000)] = 30
    """Euler steps of the diffusion head."""
    guidance: Guidance = 2.0
    """Classifier-free guidance of the velocity; 1 leaves the unconditional branch out."""
    reference_guidance: Guidance = 0.0
    """Guidance g_r towards the reference images, of a model trained with
    `loss.instruction_dropout`: v = v_uncond + g_r (v_references - v_uncond) + g (v - v_references),
    with g from `guidance`. 0 applies g to both differences.
    """
    token_guidance: Guidance = 1.0
    """Classifier-free guidance of the image tokens, of a model trained with
    `loss.caption_dropout`; 1 leaves the branch without a caption out.
    """
    batch_size: BatchSize = 16
    """Images that are sampled at once."""
