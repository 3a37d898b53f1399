"""Build the loss of a rollout for the train step: the sum of the losses of the policies that the
run trains, with the advantages of the same images."""

import jax
import jax.numpy as jnp

from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config
from blip3o_jax.rl.protocol import LossWeights, RolloutArrays
from blip3o_jax.rl.registry import make_policies
from blip3o_jax.rl.rollout_programs import images_per_prefix
from blip3o_jax.train.stages import Loss


def make_loss(config: Config, image_ids: tuple[int, int], shards: int) -> Loss:
    """Return the loss of a batch: the arrays of a rollout (rollout_programs.py) and those of
    `reward_batch.loss_inputs`. `shards`: of the batch. Metrics have the prefixes of
    their policies.
    """
    rl = config.rl
    policies = make_policies(config)
    micro_batches = config.optimizer.accumulate
    # Micro-batches take rows with a stride (train/train_step.py). If the stride divides the groups,
    # each takes equal parts of all groups, whose rows can share a prefill.
    prefix_group = (
        images_per_prefix(rl.num_generations // micro_batches, rl.num_prompts, shards)
        if rl.num_generations % micro_batches == 0
        else 1
    )

    def loss(
        model: Blip3o, batch: RolloutArrays, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del keys_B  # nothing is sampled
        weights = LossWeights(batch["advantage"], batch["valid"] > 0, batch["valid_fraction"])
        total = jnp.zeros((), jnp.float32)
        metrics: dict[str, jax.Array] = {}
        for policy in policies:
            value, found = policy.loss(model, batch, weights, image_ids, prefix_group)
            total += value
            metrics |= {f"{policy.metric_prefix}{name}": x for name, x in found.items()}
        return total, metrics

    return Loss(loss, normalizers, totals)


def normalizers(batch: RolloutArrays, images: int) -> dict[str, jax.Array]:
    """Return `valid_fraction`, that of the images with a reward."""
    del images
    # Counted: XLA multiplies by the reciprocal of a constant, and 49 times that of 49 is not 1.
    count = jnp.sum(batch["valid"] >= 0)
    return {"valid_fraction": jnp.sum(batch["valid"]) / count}


def totals(batch: RolloutArrays) -> dict[str, jax.Array]:
    """Return the number of tokens that the step scores, where a policy of tokens is trained: those
    of the prompts, padding not counted, and the image tokens.
    """
    if "image_ids" not in batch:
        return {}
    return {"tokens": jnp.sum(batch["lengths"]) + batch["image_ids"].size}
