"""The loss of a rollout, for the train step: of image tokens (grpo.py), of denoising steps
(flow_grpo.py), or their sum.

Both take the advantages of the same images. The denoising steps are conditioned on the hidden
states of the rollout; no gradient goes from them into the AR.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config
from blip3o_jax.rl import flow_grpo, grpo
from blip3o_jax.rl.rollout_programs import (
    RolloutArrays,
    flow_means,
    images_per_prefix,
    token_logprobs,
    trains_flow,
    trains_tokens,
)
from blip3o_jax.train.stages import Loss


def make_loss(config: Config, image_ids: tuple[int, int], shards: int) -> Loss:
    """Return the loss of a batch: the arrays of a rollout (rollout_programs.py) and those of
    `reward_batch.loss_inputs`. `shards`: of the batch. Metrics are called rl/..., those of the
    denoising steps rl/flow/...
    """
    rl = config.rl
    micro_batches = config.optimizer.accumulate
    # A micro-batch takes every so many rows: a part of each group, or none of some.
    share = (
        images_per_prefix(rl.num_generations // micro_batches, rl.num_prompts, shards)
        if rl.num_generations % micro_batches == 0
        else 1
    )

    def loss(
        model: Blip3o, batch: RolloutArrays, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del keys_B  # nothing is sampled
        valid_B = batch["valid"] > 0
        weights = batch["advantage"], valid_B, batch["valid_fraction"]
        total = jnp.zeros((), jnp.float32)
        metrics: dict[str, jax.Array] = {}
        if trains_tokens(rl):
            logprobs_BN, entropy_BN = token_logprobs(model, batch, rl, image_ids, share)
            value, token_metrics = grpo.policy_loss(
                logprobs_BN, batch["logprobs"], batch.get("reference_logprobs"), *weights, cfg=rl
            )
            total += value
            token_metrics["entropy"] = grpo.masked_mean(
                jax.lax.stop_gradient(entropy_BN), *weights[1:]
            )
            metrics |= {f"rl/{name}": x for name, x in token_metrics.items()}
        if trains_flow(rl):
            mean_BKHWC, std_BK = flow_means(model, batch, rl)
            log_prob = jax.vmap(flow_grpo.log_prob, in_axes=1, out_axes=1)
            logprob_BK = log_prob(batch["next_latents"], mean_BKHWC, std_BK)
            kl_BK = None
            if "reference_mean" in batch:
                kl_BK = jax.vmap(flow_grpo.kl, in_axes=1, out_axes=1)(
                    mean_BKHWC, batch["reference_mean"], std_BK
                )
            value, flow_metrics = flow_grpo.policy_loss(
                logprob_BK, batch["flow_logprobs"], kl_BK, *weights, cfg=rl.flow
            )
            total += value
            metrics |= {f"rl/flow/{name}": x for name, x in flow_metrics.items()}
        return total, metrics

    return Loss(loss, normalizers)


def normalizers(batch: RolloutArrays, images: int) -> dict[str, jax.Array]:
    """Return `valid_fraction`, that of the images with a reward."""
    del images
    # Counted: XLA multiplies by the reciprocal of a constant, and 49 times that of 49 is not 1.
    count = jnp.sum(batch["valid"] >= 0)
    return {"valid_fraction": jnp.sum(batch["valid"]) / count}
