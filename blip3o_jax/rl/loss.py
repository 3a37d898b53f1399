"""The loss of a rollout, for the train step: of image tokens (grpo.py), of denoising steps
(flow_grpo.py), or their sum.

Both see the advantages of the same images. The denoising steps are conditioned on the hidden states
that the rollout had; no gradient goes from them into the AR.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config
from blip3o_jax.rl import flow_grpo, grpo
from blip3o_jax.rl.rollout import (
    Record,
    flow_means,
    images_per_prefix,
    token_logprobs,
    trains_flow,
    trains_tokens,
)
from blip3o_jax.train.stages import Loss


def make_loss(config: Config, image_ids: tuple[int, int], shards: int) -> Loss:
    """The loss of a record (rollout.py) that has besides, for each row: `advantage`, `kept` (1 with
    a reward, else 0) and `kept_share`, that of the whole batch. `shards`: of the batch. Metrics of
    the denoising steps are called flow/...
    """
    rl, pieces = config.rl, config.optimizer.accumulate
    # A micro-batch takes every so many rows: of a group a part, or none of some.
    share = (
        images_per_prefix(rl.num_generations // pieces, rl.num_prompts, shards)
        if rl.num_generations % pieces == 0
        else 1
    )

    def loss(
        model: Blip3o, record: Record, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del keys_B  # nothing is drawn
        judged = record["advantage"], record["kept"] > 0, record["kept_share"]
        total, metrics = jnp.zeros((), jnp.float32), {}
        if trains_tokens(rl):
            logprobs_BN, entropy_BN = token_logprobs(model, record, rl, image_ids, share)
            value, metrics = grpo.policy_loss(
                logprobs_BN, record["logprobs"], record.get("reference_logprobs"), *judged, cfg=rl
            )
            total += value
            metrics["entropy"] = grpo.kept_mean(jax.lax.stop_gradient(entropy_BN), *judged[1:])
        if trains_flow(rl):
            mean_BKHWC, std_BK = flow_means(model, record, rl)
            each = jax.vmap(flow_grpo.log_prob, in_axes=1, out_axes=1)
            logprob_BK = each(record["x_next"], mean_BKHWC, std_BK)
            kl_BK = None
            if "reference_mean" in record:
                kl_BK = jax.vmap(flow_grpo.kl, in_axes=1, out_axes=1)(
                    mean_BKHWC, record["reference_mean"], std_BK
                )
            value, found = flow_grpo.policy_loss(
                logprob_BK, record["flow_logprobs"], kl_BK, *judged, cfg=rl.flow
            )
            total += value
            metrics |= {f"flow/{name}": x for name, x in found.items()}
        return total, metrics

    return loss
