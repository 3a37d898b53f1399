"""Compile a rollout: images for a batch of prompts, several of each, with the arrays that the loss
needs.

Two programs run on the run's mesh, with the same networks, sampler and sharding as training and
sampling:

    rollout      prompts --> image tokens --> latents --> pixels, with the log-probabilities of all
                 samples
    reference    the log-probabilities of these samples under the reference policy

Arrays of a rollout, B = P G images: `tokens` [B, L] and `lengths` [B] of the prompt, in the order
of the prompts, and those that each policy of the run adds (token_policy.py, flow_policy.py), which
lead with B too.

P prompts, G images of each, L prompt length.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.config import Config, RlConfig
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.rl.flow_policy import sample_ode_latents
from blip3o_jax.rl.protocol import RolloutArrays, RolloutPrompts
from blip3o_jax.rl.registry import make_policies
from blip3o_jax.rl.token_policy import sample_shared_tokens
from blip3o_jax.sampling_programs import sampling_keys, to_uint8
from blip3o_jax.train.state import StatePlan


def images_per_prefix(num_generations: int, prompts: int, shards: int) -> int:
    """Return the largest number of a group's images that share one prefill of their prompt.

    The number of prefills must divide over the shards of the batch.
    """
    return next(
        g
        for g in range(num_generations, 0, -1)
        if (num_generations % g == 0 and (prompts * num_generations // g) % shards == 0) or g == 1
    )


def make_rollout(
    config: Config, plan: StatePlan, strategy: Strategy, image_ids: tuple[int, int]
) -> Callable[..., tuple[jax.Array, RolloutArrays]]:
    """Return (params, frozen, tokens_PL, lengths_P, indices_B, seed, number) -> (uint8 images [B,
    H, W, 3], arrays), compiled for each shape. Rows are sampled from keys of (seed, their index);
    the denoising steps trained on from (seed, number of the rollout).

    Samples of no policy are generated as in inference: the image tokens once for each group, the
    latents by Euler steps. Each image has its own initial noise.
    """
    rl = config.rl
    group = rl.num_generations
    samplers = {policy.samples: policy.sample for policy in make_policies(config)}

    def rollout(
        params: Any,
        frozen: Any,
        tokens_PL: jax.Array,
        lengths_P: jax.Array,
        indices_B: jax.Array,
        seed: jax.Array,
        number: jax.Array,
    ) -> tuple[jax.Array, RolloutArrays]:
        model = plan.model(params, frozen)
        prefix_group = images_per_prefix(group, len(tokens_PL), strategy.batch_shards)
        tokens_RL, lengths_R = (
            jnp.repeat(x, group // prefix_group, axis=0) for x in (tokens_PL, lengths_P)
        )
        tokens_RL = nn.constrain(tokens_RL, "batch", None)
        prompts = RolloutPrompts(
            tokens_RL,
            lengths_R,
            *sampling_keys(seed, indices_B),
            seed,
            number,
            image_ids,
            prefix_group,
        )
        arrays = {
            "tokens": jnp.repeat(tokens_RL, prefix_group, axis=0),
            "lengths": jnp.repeat(lengths_R, prefix_group, axis=0),
        }
        if "tokens" in samplers:
            hidden_BTD, sampled = samplers["tokens"](model, prompts)
        else:
            hidden_BTD, sampled = sample_shared_tokens(model, prompts, group, rl.rollout)
        arrays |= sampled
        if "latents" in samplers:
            z_BHWC, sampled = samplers["latents"](model, prompts, hidden_BTD)
        else:
            z_BHWC, sampled = sample_ode_latents(model, prompts, hidden_BTD, rl.rollout)
        # Pixels leave the devices as uint8, a quarter of the bytes; rewards read nothing else.
        return to_uint8(model.pixels(z_BHWC)), arrays | sampled

    return strategy.jit(rollout, out_shardings=strategy.batch_sharding())


def make_reference(
    config: Config, plan: StatePlan, strategy: Strategy, image_ids: tuple[int, int]
) -> Callable[[Any, Any, RolloutArrays], RolloutArrays]:
    """Return (parameters of the reference policy, frozen, arrays) -> its log-probabilities and
    means, where the loss needs them.
    """
    rl = config.rl
    prefix_group = images_per_prefix(rl.num_generations, rl.num_prompts, strategy.batch_shards)
    policies = [policy for policy in make_policies(config) if policy.has_reference]

    def reference(params: Any, frozen: Any, arrays: RolloutArrays) -> RolloutArrays:
        model = plan.model(params, frozen)
        found: RolloutArrays = {}
        for policy in policies:
            found |= policy.reference(model, arrays, image_ids, prefix_group)
        return found

    return strategy.jit(reference, out_shardings=strategy.batch_sharding())


def num_micro_batches(cfg: RlConfig) -> int:
    """Return the number of micro-batches of a rollout.

    They have equal sizes of at most `rollout.batch_size` images, and hold whole groups.
    """
    max_prompts = max(1, cfg.rollout.batch_size // cfg.num_generations)
    return next(
        n
        for n in range(math.ceil(cfg.num_prompts / max_prompts), cfg.num_prompts + 1)
        if cfg.num_prompts % n == 0
    )
