"""Define the flow-matching sampler as a policy: Flow-GRPO (arXiv 2505.05470).

The ODE of sampling, dx = v dsigma from sigma 1 down to 0, has at each sigma the density p_sigma. An
SDE that adds noise of strength eta and draws back along the score has the same densities
(Anderson's reverse-time equation). With dsigma < 0:

    dx = [v - eta^2 / 2 grad log p_sigma(x)] dsigma + eta sqrt(-dsigma) n        n ~ N(0, I)

The score follows from v. As x = (1 - sigma) z + sigma e and v = E[e - z | x], E[e | x] = x + (1 -
sigma) v, and grad log p_sigma(x) = -E[e | x] / sigma. So a step to sigma' = sigma + dsigma is
sampled from a Gaussian:

    eta = a sqrt(sigma / (1 - sigma))
    mean = x + dsigma [v + eta^2 / (2 sigma) (x + (1 - sigma) v)]
    s = eta sqrt(-dsigma), the deviation
    l = mean over the D numbers of a latent of -(x' - mean)^2 / (2 s^2) - log s - log(2 pi) / 2
    KL = mean over the D numbers of (mean - mean_ref)^2 / (2 s^2)
    r = exp(l - l^old)
    L = mean over valid images and trained steps of -min(r A, clip(r, 1 - c, 1 + c) A) + beta KL

Deviations:
1. eta is infinite at sigma = 1. There the second noise level replaces sigma in 1 - sigma, as in the
   released code; all other terms use the true sigma. "At 1" is within 1e-6: a shift can leave the
   first level an ulp below.
2. l and KL are means over the latent's numbers, not sums, as in the released code. So r is the D-th
   root of the ratio of densities, and its clip is small. The constants of the density are included;
   they cancel in r.
3. The released code divides its KL by eta^2, without the step's -dsigma. Here it is the KL of the
   Gaussians, divided by s^2.
4. The last step, to sigma = 0, is always the ODE's: the decoded latents have no noise added to
   them. It has no probability, so it is never trained on.
5. By default only the trained steps have noise, and all others are the ODE's (the idea of
   Flow-GRPO-Fast). All the randomness after the start is then in trained steps, so the reward has
   no variance from draws without a gradient, and images are nearer to those of the ODE that
   evaluation uses. `noise_everywhere` is the paper's first form.
6. Flow-GRPO-Fast branches a group from one trajectory at a window of steps. Here a rollout's steps
   are sampled from all except the last, the same for all rows, and every row has its own start.
7. A step of finite length has an error, as the Euler step has; the means of the marginals have
   none. For z ~ N(m, 0.6^2), a = 0.7 and shift 1 the deviation at the end is 4 % small in 10 noisy
   steps (the Euler sampler's: 13 %), 0.2 % off in 1000. Near the start it is too large, by 10 % in
   10 steps and still by 5 % in 1000: eta^2 times the first step is always a^2, which adds a^4 / 4
   to the variance. The later steps remove that error.

B batch, K trained steps; latents are [B, H, W, C]. Everything is float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax.config import FlowConfig, FlowPolicyConfig
from blip3o_jax.dit import flow as flow_matching
from blip3o_jax.rl import grpo


class Trajectory(NamedTuple):
    """Hold the steps of a rollout that are trained on."""

    step_K: jax.Array  # int32, ascending: index of the step in the sampler
    x_BKHWC: jax.Array  # before the step
    next_BKHWC: jax.Array  # after it
    logprob_BK: jax.Array


def transition(
    x_BHWC: jax.Array,
    velocity_BHWC: jax.Array,
    sigma_B: jax.Array,
    next_B: jax.Array,
    *,
    noise: float,
) -> tuple[jax.Array, jax.Array]:
    """Return the mean [B, H, W, C] and deviation [B] of x at the noise level `next_B`, given x at
    `sigma_B`; `noise` is a.

    `next_B` is the level after `sigma_B` in the sampler's list. With noise 0 the mean is the Euler
    step.
    """
    x_BHWC, velocity_BHWC = x_BHWC.astype(jnp.float32), velocity_BHWC.astype(jnp.float32)
    second_B = jnp.where(sigma_B > 1 - 1e-6, next_B, sigma_B)
    eta_B = noise * jnp.sqrt(sigma_B / (1 - second_B))
    sigma, step, eta = (_per_row(x) for x in (sigma_B, next_B - sigma_B, eta_B))
    noise_guess_BHWC = x_BHWC + (1 - sigma) * velocity_BHWC
    mean_BHWC = x_BHWC + step * (velocity_BHWC + eta**2 / (2 * sigma) * noise_guess_BHWC)
    return mean_BHWC, eta_B * jnp.sqrt(sigma_B - next_B)


def log_prob(next_BHWC: jax.Array, mean_BHWC: jax.Array, std_B: jax.Array) -> jax.Array:
    """Return the log-density of a Gaussian, constants included, as a mean over the latent's
    numbers: [B].
    """
    squares_B = _mean_square((next_BHWC.astype(jnp.float32) - mean_BHWC) / _per_row(std_B))
    return -squares_B / 2 - jnp.log(std_B) - math.log(2 * math.pi) / 2


def kl(mean_BHWC: jax.Array, reference_mean_BHWC: jax.Array, std_B: jax.Array) -> jax.Array:
    """Return the KL divergence between two Gaussians of the same deviation, as a mean over the
    latent's numbers: [B].
    """
    return _mean_square((mean_BHWC - reference_mean_BHWC) / _per_row(std_B)) / 2


def choose_steps(key: jax.Array, steps: int, trained_steps: int) -> jax.Array:
    """Choose `trained_steps` of the sampler's `steps`, never the last: int32 [K], ascending."""
    # Sorted, as `sample_sde` finds a step's slot by binary search.
    return jnp.sort(jax.random.choice(key, steps - 1, (trained_steps,), replace=False)).astype(
        jnp.int32
    )


def step_sigmas(step_K: jax.Array, *, steps: int, flow: FlowConfig) -> tuple[jax.Array, jax.Array]:
    """Return the noise levels before and after each of the given steps of a sampler of `steps`; of
    the shape of `step_K`.
    """
    sigmas_S = jnp.asarray(flow_matching.sampling_sigmas(steps, flow))
    return sigmas_S[step_K], sigmas_S[step_K + 1]


def sample_sde(
    velocity_fn: Callable[[jax.Array, jax.Array], jax.Array],
    noise_BHWC: jax.Array,
    keys_B: jax.Array,
    steps_K: jax.Array,
    *,
    steps: int,
    noise: float,
    flow: FlowConfig,
    noise_everywhere: bool = False,
) -> tuple[jax.Array, Trajectory]:
    """Sample latents [B, H, W, C] from `noise_BHWC` ~ N(0, I); return them and the steps `steps_K`
    (of `choose_steps`) of the way there. To be called under `jax.jit`.

    `velocity_fn(x_BHWC, timestep_B)` is traced once. The noise of a step is drawn from the row's
    typed key, folded with the step, so a row's result does not depend on its batch.
    """
    B = len(noise_BHWC)
    (K,) = steps_K.shape
    shape = noise_BHWC.shape[1:]

    def step(
        carry: tuple[jax.Array, Trajectory], index: jax.Array
    ) -> tuple[tuple[jax.Array, Trajectory], None]:
        x_BHWC, path = carry
        sigma_B, next_B = (
            jnp.broadcast_to(s, (B,)) for s in step_sigmas(index, steps=steps, flow=flow)
        )
        velocity_BHWC = velocity_fn(x_BHWC, sigma_B * flow.num_train_timesteps).astype(jnp.float32)
        mean_BHWC, std_B = transition(x_BHWC, velocity_BHWC, sigma_B, next_B, noise=noise)
        # Drawn at every step and used at the noisy ones: which these are is traced.
        draw_BHWC = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(
            keys_B
        )
        noisy = index < steps - 1 if noise_everywhere else jnp.any(steps_K == index)
        ode_BHWC = x_BHWC + _per_row(next_B - sigma_B) * velocity_BHWC
        next_BHWC = jnp.where(noisy, mean_BHWC + _per_row(std_B) * draw_BHWC, ode_BHWC)
        # A step writes to the slot of the first trained step that is not before it: a trained step
        # is the last that writes to its slot, and after the last of them there is no slot. So
        # nothing has to choose between two copies of the slots.
        slot = jnp.searchsorted(steps_K, index)
        put = lambda slots, x: slots.at[:, slot].set(x, mode="drop")
        path = Trajectory(
            steps_K,
            put(path.x_BKHWC, x_BHWC),
            put(path.next_BKHWC, next_BHWC),
            put(path.logprob_BK, log_prob(next_BHWC, mean_BHWC, std_B)),
        )
        return (next_BHWC, path), None

    slots = jnp.zeros((B, K, *shape), jnp.float32)
    start = (
        noise_BHWC.astype(jnp.float32),
        Trajectory(steps_K, slots, slots, jnp.zeros((B, K), jnp.float32)),
    )
    return jax.lax.scan(step, start, jnp.arange(steps))[0]


def policy_loss(
    logprob_BK: jax.Array,
    old_logprob_BK: jax.Array,
    kl_BK: jax.Array | None,
    advantage_B: jax.Array,
    valid_B: jax.Array,
    valid_fraction_B: jax.Array,
    *,
    cfg: FlowPolicyConfig,
) -> tuple[jax.Array, grpo.Metrics]:
    """Return the loss of a (micro-)batch and its metrics, scalars; a trained step here is what a
    token is in `rl/grpo.py`.

    Gradients go through `logprob_BK` and `kl_BK`. The latter may be None where `cfg.kl_coef` is 0,
    else that raises ValueError. `valid_fraction_B`, rows that are not valid, micro-batches and
    metrics: as in `grpo.policy_loss`.
    """
    if kl_BK is None and cfg.kl_coef:
        raise ValueError(
            f"rl.flow.kl_coef={cfg.kl_coef} needs the KL divergence to the reference policy"
        )
    log_ratio_BK = grpo.masked_difference(
        logprob_BK, jax.lax.stop_gradient(old_logprob_BK), valid_B
    )
    loss_BK, metrics = grpo.clipped_loss(
        log_ratio_BK, advantage_B, valid_B, valid_fraction_B, clip=(cfg.clip, cfg.clip)
    )
    if kl_BK is not None:
        loss_BK += cfg.kl_coef * kl_BK
        metrics["kl"] = grpo.masked_mean(kl_BK, valid_B, valid_fraction_B)
    return grpo.masked_mean(loss_BK, valid_B, valid_fraction_B), metrics


def _per_row(x_B: jax.Array) -> jax.Array:
    return x_B[:, None, None, None]


def _mean_square(x_BHWC: jax.Array) -> jax.Array:
    return jnp.mean(x_BHWC**2, axis=(1, 2, 3))
