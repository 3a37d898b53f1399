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

    # Of the image tokens; 0 takes the likeliest.
    temperature: Annotated[float, Bounds(0, 1000)] = 1.0
    top_k: Count = 1200  # image tokens kept at each position; 0 keeps all
    # Probability mass kept at each position; 1 keeps all.
    top_p: Annotated[float, Bounds(0, 1, open_low=True, note="1 switches it off")] = 0.95
    steps: Annotated[int, Bounds(1, 10_000)] = 30  # Euler steps of the diffusion head
    # Classifier-free, of the velocity; 1 leaves the unconditional branch out.
    guidance: Guidance = 2.0
    # Towards the reference images: v = v_uncond + g_r (v_references - v_uncond) + g (v -
    # v_references); 0 has the guidance above for both. A model learns the branch of the references
    # alone by loss.instruction_dropout.
    reference_guidance: Guidance = 0.0
    # Classifier-free guidance of the image tokens; 1 leaves the branch without a caption out, which
    # only means something to a model trained with loss.caption_dropout.
    token_guidance: Guidance = 1.0
    batch_size: BatchSize = 16  # prompts drawn at once
