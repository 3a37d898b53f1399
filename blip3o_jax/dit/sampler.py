"""Noise -> latents: Euler steps along the velocity, with classifier-free guidance (arXiv
2207.12598).

    v = v_null + g (v_condition - v_null)
    v = v_null + g_r (v_references - v_null) + g (v_condition - v_references)       with a guidance of its own for references

The second form is that of InstructPix2Pix (arXiv 2211.09800, equation 3); with g_r = g it is the
first.

B batch, T condition tokens, C channels (of the condition or of the latents), S steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax.config import FlowConfig
from blip3o_jax.dit import flow as flow_matching
from blip3o_jax.dit.sana import Condition, SanaTransformer


class Guidance(NamedTuple):
    """The branches of a guided velocity, and their weights g and g_r, Python values. A condition of
    one row serves every row; where all its tokens are equal, one of them is enough.
    """

    condition: Condition
    null: Condition | None = None  # None: no guidance, as if g were 1
    scale: float = 1.0
    references: Condition | None = None  # None: the first form above
    reference_scale: float = 1.0


def sample(
    dit: SanaTransformer,
    guidance: Guidance,
    noise_BHWC: jax.Array,
    *,
    steps: int,
    flow: FlowConfig,
) -> jax.Array:
    """Latents [B, H, W, C], float32, from noise ~ N(0, I), in one loop over the steps; to be called
    under `jax.jit`. `steps` and `flow` are Python values.
    """
    return euler(guided_velocity(dit, guidance), noise_BHWC, steps=steps, flow=flow)


def euler(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise_BHWC: jax.Array,
    *,
    steps: int,
    flow: FlowConfig,
) -> jax.Array:
    """Euler's method along `velocity(latents, timestep_B)`; see `sample`."""

    def step(z_BHWC: jax.Array, sigma_pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, sigma_next = sigma_pair
        timestep_B = jnp.broadcast_to(sigma * flow.num_train_timesteps, z_BHWC.shape[:1])
        return z_BHWC + (sigma_next - sigma) * velocity(z_BHWC, timestep_B), None

    sigmas_S = jnp.asarray(flow_matching.sampling_sigmas(steps, flow))
    z_BHWC, _ = jax.lax.scan(step, noise_BHWC.astype(jnp.float32), (sigmas_S[:-1], sigmas_S[1:]))
    return z_BHWC


def guided_velocity(
    dit: SanaTransformer, guidance: Guidance
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(latents [B, H, W, C], timesteps [B]) -> velocity, float32, with what does not depend on them
    done once.
    """

    # The branches differ in their number of condition tokens, so each is a call of its own: padding
    # the null branch to T and masking would spend the cross-attention of T tokens on it. Everything
    # else is the same work either way.
    def branch(condition: Condition | None) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        if condition is None:
            return None
        context = dit.prepare(condition.tokens_BTC, condition.mask_BT)
        return lambda z_BHWC, timestep_B: dit.velocity(
            z_BHWC, timestep_B, context, condition.latent_concat
        ).astype(jnp.float32)

    given, null, references = map(branch, (guidance.condition, guidance.null, guidance.references))

    def velocity(z_BHWC: jax.Array, timestep_B: jax.Array) -> jax.Array:
        v_BHWC = given(z_BHWC, timestep_B)
        if null is None:
            return v_BHWC
        v_null_BHWC = null(z_BHWC, timestep_B)
        if references is None:
            return v_null_BHWC + guidance.scale * (v_BHWC - v_null_BHWC)
        v_references_BHWC = references(z_BHWC, timestep_B)
        towards_BHWC = guidance.reference_scale * (v_references_BHWC - v_null_BHWC)
        return v_null_BHWC + towards_BHWC + guidance.scale * (v_BHWC - v_references_BHWC)

    return velocity
