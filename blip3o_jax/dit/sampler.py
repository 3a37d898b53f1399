"""Sample latents from noise by Euler steps with classifier-free guidance (arXiv 2207.12598).

    v = v_uncond + g (v_condition - v_uncond)
    v = v_uncond + g_r (v_references - v_uncond) + g (v_condition - v_references)

The second form is for reference images, with their scale g_r (InstructPix2Pix, arXiv 2211.09800,
equation 3); with g_r = g it equals the first.

B batch, T condition tokens, C channels (of the condition or of the latents), S steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax.config import FlowConfig
from blip3o_jax.dit import flow as flow_matching
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


def sample(
    dit: DiffusionHead,
    guidance: Guidance,
    noise_BHWC: jax.Array,
    *,
    steps: int,
    flow: FlowConfig,
) -> jax.Array:
    """Sample latents [B, H, W, C], float32, from noise ~ N(0, I).

    The steps are one loop. Call it under `jax.jit`; `steps` and `flow` are Python values.
    """
    return euler(guided_velocity(dit, guidance), noise_BHWC, steps=steps, flow=flow)


def euler(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise_BHWC: jax.Array,
    *,
    steps: int,
    flow: FlowConfig,
) -> jax.Array:
    """Integrate `velocity(latents, timestep_B)` by Euler's method, as `sample` does."""

    def step(z_BHWC: jax.Array, sigma_pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, sigma_next = sigma_pair
        timestep_B = jnp.broadcast_to(sigma * flow.num_train_timesteps, z_BHWC.shape[:1])
        return z_BHWC + (sigma_next - sigma) * velocity(z_BHWC, timestep_B), None

    # The latents are float32 through all steps: bfloat16 would round away a step's small update.
    sigmas_S = jnp.asarray(flow_matching.sampling_sigmas(steps, flow))
    z_BHWC, _ = jax.lax.scan(step, noise_BHWC.astype(jnp.float32), (sigmas_S[:-1], sigmas_S[1:]))
    return z_BHWC


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
