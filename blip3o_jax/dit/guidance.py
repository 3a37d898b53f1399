"""Guide the velocity of a diffusion head without a classifier (arXiv 2207.12598).

    v = v_uncond + g (v_condition - v_uncond)
    v = v_uncond + g_r (v_references - v_uncond) + g (v_condition - v_references)

The second form is for reference images, with their scale g_r (InstructPix2Pix, arXiv 2211.09800,
equation 3); with g_r = g it equals the first.

B batch, T condition tokens, C channels (of the condition or of the latents).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax.dit.protocol import Condition, DiffusionHead


class Guidance(NamedTuple):
    """Hold the conditions of a guided velocity and the scales g and g_r (Python values).

    A condition of one row is broadcast to every row; one token suffices if all are equal.
    """

    condition: Condition
    uncond: Condition | None = None  # None: no guidance, as if g were 1
    scale: float = 1.0
    references: Condition | None = None  # None: the first form of the module's equations
    reference_scale: float = 1.0


def guided_velocity(
    dit: DiffusionHead, guidance: Guidance
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the function (latents [B, H, W, C], timesteps [B]) -> velocity, float32.

    Values that depend on neither are computed once, outside of the returned function.
    """

    # The branches have different numbers of condition tokens, so each is a separate call: one
    # batched call would pad the unconditional branch to T tokens of cross-attention.
    def branch(condition: Condition) -> Callable[[jax.Array, jax.Array], jax.Array]:
        context = dit.prepare(condition.tokens_BTC, condition.mask_BT)
        return lambda z_BHWC, timestep_B: dit.velocity(
            z_BHWC, timestep_B, context, condition.latent_concat
        ).astype(jnp.float32)

    cond = branch(guidance.condition)
    uncond = None if guidance.uncond is None else branch(guidance.uncond)
    references = None if guidance.references is None else branch(guidance.references)

    def velocity(z_BHWC: jax.Array, timestep_B: jax.Array) -> jax.Array:
        v_BHWC = cond(z_BHWC, timestep_B)
        if uncond is None:
            return v_BHWC
        v_uncond_BHWC = uncond(z_BHWC, timestep_B)
        if references is None:
            return v_uncond_BHWC + guidance.scale * (v_BHWC - v_uncond_BHWC)
        v_references_BHWC = references(z_BHWC, timestep_B)
        reference_term_BHWC = guidance.reference_scale * (v_references_BHWC - v_uncond_BHWC)
        return v_uncond_BHWC + reference_term_BHWC + guidance.scale * (v_BHWC - v_references_BHWC)

    return velocity
