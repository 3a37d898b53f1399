"""Compute the policy loss on image tokens: GRPO (arXiv 2402.03300) and its variants Dr. GRPO
(2503.20783), DAPO (2503.14476) and GSPO (2507.18071).

    r_t = exp(l_t - l_t^old)                            ratio "token": one for each token
    r_t = exp(mean over s of (l_s - l_s^old))           ratio "sequence": one for an image (GSPO)
    L_t = -min(r_t A, clip(r_t, 1 - down, 1 + up) A) + beta k_t
    k_t = exp(q_t - l_t) - (q_t - l_t) - 1              k3 estimator of KL(policy || reference)
    L = sum over valid images and t of L_t / (n_valid N)  "bnpo", "grpo"
    L = sum over valid images and t of L_t / (n N)        "dr_grpo"

l, l^old, q are log-probabilities of the policy, of the policy that sampled and of the reference,
under the distribution that was sampled from. A token gives no gradient through its ratio where the
clip is the smaller term: r > 1 + up with A > 0, or r < 1 - down with A < 0.

Deviations:
1. Every image has the same number N of tokens. So "grpo" (mean of each image's tokens, then of
   images) and "bnpo" (mean over all tokens) are the same number, and Dr. GRPO's constant is N: it
   divides by all images of the batch, including those that are not valid. With every image valid,
   the three are equal.
2. An image that is not valid (its reward failed) contributes nothing, its KL included, even if its
   numbers are not finite.
3. A degenerate group has advantage 0: no gradient from the reward, but its KL stays, as in TRL.
4. The ratio of GSPO has the clip of `RlConfig.clip`; the paper's is about 1e-4, which a
   configuration must set.
5. DAPO's penalty on overlong answers does not apply.

The mean of the loss and the metrics over equal micro-batches is that of the whole batch: sums are
divided by the fraction of valid images in the whole batch, `valid_fraction_B`, the same in every
row. The one exception is `ratio_gap_max`.

B images, N image tokens. Everything is float32.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.config import RlConfig

Metrics = dict[str, jax.Array]


def policy_loss(
    logprobs_BN: jax.Array,
    old_logprobs_BN: jax.Array,
    reference_logprobs_BN: jax.Array | None,
    advantage_B: jax.Array,
    valid_B: jax.Array,
    valid_fraction_B: jax.Array,
    *,
    cfg: RlConfig,
) -> tuple[jax.Array, Metrics]:
    """Return the loss of a (micro-)batch and its metrics, scalars.

    Only `logprobs_BN` has a gradient. `valid_fraction_B` is the mean of `valid_B` over the whole
    batch, in every row. `reference_logprobs_BN` may be None where `cfg.kl_coef` is 0, else that
    raises ValueError. Metrics, means over valid tokens: those of `clipped_loss`, and `kl` to the
    reference where there is one.
    """
    if reference_logprobs_BN is None and cfg.kl_coef:
        raise ValueError(f"rl.kl_coef={cfg.kl_coef} needs the reference policy's log-probabilities")
    # The old log-probabilities are constants: the gradient of r is r times that of l.
    log_ratio_BN = masked_difference(logprobs_BN, jax.lax.stop_gradient(old_logprobs_BN), valid_B)
    loss_BN, metrics = clipped_loss(
        log_ratio_BN,
        advantage_B,
        valid_B,
        valid_fraction_B,
        clip=cfg.clip,
        ratio=cfg.importance_sampling_level,
    )
    if reference_logprobs_BN is not None:
        gap_BN = masked_difference(
            jax.lax.stop_gradient(reference_logprobs_BN), logprobs_BN, valid_B
        )
        # expm1: exp(g) - 1 cancels for the small gaps near the reference.
        kl_BN = jnp.expm1(gap_BN) - gap_BN
        loss_BN += cfg.kl_coef * kl_BN
        metrics["kl"] = masked_mean(kl_BN, valid_B, valid_fraction_B)
    fraction_B = (
        jnp.ones_like(valid_fraction_B) if cfg.loss_aggregation == "dr_grpo" else valid_fraction_B
    )
    return masked_mean(loss_BN, valid_B, fraction_B), metrics


def clipped_loss(
    log_ratio_BN: jax.Array,
    advantage_B: jax.Array,
    valid_B: jax.Array,
    valid_fraction_B: jax.Array,
    *,
    clip: tuple[float, float],
    ratio: str = "token",
) -> tuple[jax.Array, Metrics]:
    """Return -min(r A, clip(r) A) of every token [B, N], and metrics. `clip` is how far r may go
    (down, up); `log_ratio_BN` is of `masked_difference`: in a row that is not valid r is 1.

    Metrics, means over valid tokens: `clip_ratio/low_mean` and `clip_ratio/high_mean`, the
    fractions that the clip left without a gradient; `importance_sampling_ratio`, before the clip;
    `approx_kl`, KL(old policy || policy) by the k3 estimator; and, always of single tokens, since a
    sequence's mean would hide them, `ratio_gap`, |r - 1|, and `ratio_gap_max`, its maximum. The
    average of `ratio_gap_max` over m micro-batches is between 1/m of the maximum and the maximum.
    """
    advantage_B1 = advantage_B.astype(jnp.float32)[:, None]
    token_ratio_BN = jnp.exp(log_ratio_BN)
    r_BN = token_ratio_BN
    if ratio == "sequence":
        r_BN = jnp.broadcast_to(
            jnp.exp(jnp.mean(log_ratio_BN, axis=1, keepdims=True)), log_ratio_BN.shape
        )
    low, high = 1 - clip[0], 1 + clip[1]
    # The minimum with the unclipped term keeps the gradient of a ratio that has moved to the wrong
    # side of the clip (PPO, arXiv 1707.06347, eq. 7).
    loss_BN = -jnp.minimum(r_BN * advantage_B1, jnp.clip(r_BN, low, high) * advantage_B1)
    gap_BN = jnp.abs(token_ratio_BN - 1)
    per_token = {
        # With the other sign of the advantage the clipped term is the larger one, so that the clip
        # has no effect.
        "clip_ratio/low_mean": ((r_BN < low) & (advantage_B1 < 0)).astype(jnp.float32),
        "clip_ratio/high_mean": ((r_BN > high) & (advantage_B1 > 0)).astype(jnp.float32),
        "importance_sampling_ratio": r_BN,
        "ratio_gap": gap_BN,
        "approx_kl": jnp.expm1(log_ratio_BN) - log_ratio_BN,
    }
    metrics = {
        name: masked_mean(x_BN, valid_B, valid_fraction_B) for name, x_BN in per_token.items()
    }
    return loss_BN, metrics | {"ratio_gap_max": jnp.max(gap_BN)}


def masked_difference(a_BN: jax.Array, b_BN: jax.Array, valid_B: jax.Array) -> jax.Array:
    """Return a - b in float32, 0 in rows that are not valid: neither their values nor their
    gradients reach the loss.
    """
    # `where` on the difference, before any exp: the gradient of what it leaves out is 0, even for
    # inf or NaN.
    return jnp.where(valid_B[:, None], a_BN.astype(jnp.float32) - b_BN.astype(jnp.float32), 0)


def masked_mean(x_BN: jax.Array, valid_B: jax.Array, valid_fraction_B: jax.Array) -> jax.Array:
    """Return the mean over valid rows, by their fraction of the whole batch; 0 where that is 0."""
    return jnp.mean(jnp.where(valid_B[:, None], x_BN, 0)) / jnp.maximum(
        # All entries are equal: their mean is the scalar, under any sharding.
        jnp.mean(valid_fraction_B),
        1e-9,
    )
