"""A rollout: images for a batch of prompts, several of each, with what is needed to learn from
them. Two compiled programs on the run's mesh, of the same networks, sampler and sharding as
training and sampling:

    rollout      prompts --> image tokens --> latents --> pixels, with the log-probabilities of all that was sampled
    reference    the log-probabilities of these samples under the reference policy

Arrays of a rollout, B = P G images: arrays that lead with B, in the order of the prompts.

    tokens, lengths          [B, L], [B]          the prompt
    image_ids, logprobs      [B, N]               policy "ar" and "both"; `support` [B, N, X] where top-k or top-p is on
    reference_logprobs       [B, N]               where rl.kl_coef is not 0
    hidden                   [B, N + 1, D]        policy "flow" and "both": the condition before the connector
    latents, next_latents    [B, K, H, W, C]      before and after the steps trained on
    step                     [B, K]               which steps these are
    flow_logprobs            [B, K]
    reference_mean           [B, K, H, W, C]      where rl.flow.kl_coef is not 0

P prompts, G images of each, L prompt length, N image tokens, K denoising steps that are trained on.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, RlConfig, SamplingConfig
from blip3o_jax.dit import sampler
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.rl import flow_grpo
from blip3o_jax.rl.scoring import score_image_tokens
from blip3o_jax.sampling_programs import (
    prepare_latents,
    sample_image_tokens,
    sampling_keys,
    to_uint8,
)
from blip3o_jax.train.state import StatePlan

RolloutArrays = dict[str, jax.Array]


def trains_tokens(cfg: RlConfig) -> bool:
    return cfg.policy in ("ar", "both")


def trains_flow(cfg: RlConfig) -> bool:
    return cfg.policy in ("flow", "both")


def has_reference(cfg: RlConfig) -> bool:
    return bool((trains_tokens(cfg) and cfg.kl_coef) or (trains_flow(cfg) and cfg.flow.kl_coef))


def images_per_prefix(num_generations: int, prompts: int, shards: int) -> int:
    """Return how many images of a group share the prefill of their prompt: as many as leave every
    device a prompt.
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

    With policy "flow" the images of a group share their image tokens, sampled once, so that their
    rewards differ by the denoising alone, which is what is trained. Each has its own initial noise.
    """
    rl, cfg = config.rl, config.model
    settings = rl.rollout
    group = rl.num_generations

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
        share = images_per_prefix(group, len(tokens_PL), strategy.batch_shards)
        tokens_RL, lengths_R = (
            jnp.repeat(x, group // share, axis=0) for x in (tokens_PL, lengths_P)
        )
        tokens_RL = nn.constrain(tokens_RL, "batch", None)
        token_keys_B, noise_keys_B = sampling_keys(seed, indices_B)
        arrays = {
            "tokens": jnp.repeat(tokens_RL, share, axis=0),
            "lengths": jnp.repeat(lengths_R, share, axis=0),
        }
        sample_ids = functools.partial(
            sample_image_tokens,
            model,
            tokens_RL,
            lengths_R,
            settings=settings,
            image_ids=image_ids,
        )
        if trains_tokens(rl):
            sampled = sample_ids(keys_B=token_keys_B, group=share, return_support=True)
            hidden_BTD = sampled.hidden_BTD
            arrays |= {"image_ids": sampled.ids_BN, "logprobs": sampled.logprobs_BN}
            arrays |= {} if sampled.support_BNX is None else {"support": sampled.support_BNX}
        else:  # all images of a group have the image tokens of its first row
            sampled = sample_ids(keys_B=jnp.repeat(token_keys_B[::group], group // share, axis=0))
            hidden_BTD = jnp.repeat(sampled.hidden_BTD, share, axis=0)
        noise_BHWC = prepare_latents(cfg, noise_keys_B)
        velocity = guided_velocity_fn(model, hidden_BTD, settings)
        with nn.part("dit"):
            if trains_flow(rl):
                steps_key = jax.random.fold_in(
                    jax.random.fold_in(jax.random.key(seed), 2**32 - 1), number
                )
                steps_K = flow_grpo.choose_steps(steps_key, rl.flow.steps, rl.flow.trained_steps)
                z_BHWC, path = flow_grpo.sample_sde(
                    velocity,
                    noise_BHWC,
                    noise_keys_B,
                    steps_K,
                    steps=rl.flow.steps,
                    noise=rl.flow.noise_level,
                    flow=cfg.flow,
                )
                arrays |= {
                    "hidden": hidden_BTD,
                    "latents": path.x_BKHWC,
                    "next_latents": path.next_BKHWC,
                    "step": jnp.broadcast_to(path.step_K, path.logprob_BK.shape),
                    "flow_logprobs": path.logprob_BK,
                }
            else:
                z_BHWC = sampler.euler(velocity, noise_BHWC, steps=settings.steps, flow=cfg.flow)
        return to_uint8(model.pixels(z_BHWC)), arrays

    return strategy.jit(rollout, out_shardings=strategy.batch_sharding())


def make_reference(
    config: Config, plan: StatePlan, strategy: Strategy, image_ids: tuple[int, int]
) -> Callable[[Any, Any, RolloutArrays], RolloutArrays]:
    """Return (parameters of the reference policy, frozen, arrays) -> its log-probabilities and
    means, where the loss needs them.
    """
    rl = config.rl
    share = images_per_prefix(rl.num_generations, rl.num_prompts, strategy.batch_shards)

    def reference(params: Any, frozen: Any, arrays: RolloutArrays) -> RolloutArrays:
        model = plan.model(params, frozen)
        found = {}
        if trains_tokens(rl) and rl.kl_coef:
            found["reference_logprobs"], _ = token_logprobs(model, arrays, rl, image_ids, share)
        if trains_flow(rl) and rl.flow.kl_coef:
            found["reference_mean"], _ = flow_means(model, arrays, rl)
        return found

    return strategy.jit(reference, out_shardings=strategy.batch_sharding())


def token_logprobs(
    model: Blip3o, arrays: RolloutArrays, rl: RlConfig, image_ids: tuple[int, int], share: int
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probabilities of the image tokens and the entropies, float32 [B, N]. `share`
    rows have one prefill of their prompt.
    """
    with nn.part("ar"):
        return score_image_tokens(
            model.ar,
            arrays["tokens"],
            arrays["lengths"],
            arrays["image_ids"],
            arrays.get("support"),
            rl.rollout,
            image_ids=image_ids,
            chunk=rl.logits_chunk,
            group=share,
        )


def flow_means(model: Blip3o, arrays: RolloutArrays, rl: RlConfig) -> tuple[jax.Array, jax.Array]:
    """Return the means [B, K, H, W, C] and deviations [B, K] of the denoising steps."""
    flow = model.cfg.flow
    velocity = guided_velocity_fn(model, arrays["hidden"], rl.rollout)
    sigma_BK, next_BK = flow_grpo.step_sigmas(arrays["step"], steps=rl.flow.steps, flow=flow)

    def one(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x_BHWC, sigma_B, next_B = inputs
        with nn.part("dit"):
            v_BHWC = velocity(x_BHWC, sigma_B * flow.num_train_timesteps)
        return None, flow_grpo.transition(
            x_BHWC, v_BHWC, sigma_B, next_B, noise=rl.flow.noise_level
        )

    steps_first = jax.tree.map(lambda x: x.swapaxes(0, 1), (arrays["latents"], sigma_BK, next_BK))
    _, found = jax.lax.scan(jax.checkpoint(one), None, steps_first)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), found)


def guided_velocity_fn(
    model: Blip3o, hidden_BTD: jax.Array, settings: SamplingConfig
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return (latents, timesteps) -> the velocity under classifier-free guidance."""
    guidance = model.guidance(hidden_BTD, settings)
    with nn.part("dit"):
        return sampler.guided_velocity(model.dit, guidance)


def num_micro_batches(cfg: RlConfig) -> int:
    """Return how many micro-batches a rollout is sampled in: of at most `rollout.batch_size` images
    each, of whole groups, all of one size.
    """
    max_prompts = max(1, cfg.rollout.batch_size // cfg.num_generations)
    return next(
        n
        for n in range(math.ceil(cfg.num_prompts / max_prompts), cfg.num_prompts + 1)
        if cfg.num_prompts % n == 0
    )
