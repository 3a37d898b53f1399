"""A rollout: images for a batch of prompts, several of each, with what is needed to learn from
them. Two compiled programs on the run's mesh, of the same networks, sampler and sharding as
training and sampling:

    draw         prompts --> image tokens --> latents --> pixels, with the log-probabilities of all that was drawn
    reference    what the policy that the run started from says of these draws

Record of a rollout, B = P G images: arrays that lead with B, in the order of the prompts.

    tokens, lengths          [B, L], [B]          the prompt
    image_ids, logprobs      [B, N]               policy "ar" and "both"; `classes` [B, N, X] where top-k or top-p is on
    reference_logprobs       [B, N]               where rl.kl_coef is not 0
    hidden                   [B, N + 1, D]        policy "flow" and "both": the condition before the connector
    x, x_next                [B, K, H, W, C]      latents before and after the steps trained on
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

Record = dict[str, jax.Array]


def trains_tokens(cfg: RlConfig) -> bool:
    return cfg.policy in ("ar", "both")


def trains_flow(cfg: RlConfig) -> bool:
    return cfg.policy in ("flow", "both")


def has_reference(cfg: RlConfig) -> bool:
    return bool((trains_tokens(cfg) and cfg.kl_coef) or (trains_flow(cfg) and cfg.flow.kl_coef))


def images_per_prefix(group: int, prompts: int, shards: int) -> int:
    """Return how many images of a group share the prefill of their prompt: as many as leave every
    device a prompt of its own.
    """
    return next(
        g
        for g in range(group, 0, -1)
        if (group % g == 0 and (prompts * group // g) % shards == 0) or g == 1
    )


def make_draw(
    config: Config, plan: StatePlan, strategy: Strategy, image_ids: tuple[int, int]
) -> Callable[..., tuple[jax.Array, Record]]:
    """(params, frozen, tokens_PL, lengths_P, indices_B, seed, rollout) -> (uint8 images [B, H, W,
    3], record), compiled for each shape. Rows are drawn from keys of (seed, their index); the
    denoising steps trained on from (seed, rollout).

    With policy "flow" the images of a group share their image tokens, drawn once, so that what
    tells their rewards apart is what learns from them. Their start noise is their own.
    """
    rl, cfg = config.rl, config.model
    settings, group = rl.rollout, rl.num_generations

    def draw(
        params: Any,
        frozen: Any,
        tokens_PL: jax.Array,
        lengths_P: jax.Array,
        indices_B: jax.Array,
        seed: jax.Array,
        rollout: jax.Array,
    ) -> tuple[jax.Array, Record]:
        model = plan.model(params, frozen)
        share = images_per_prefix(group, len(tokens_PL), strategy.batch_shards)
        tokens_RL, lengths_R = (
            jnp.repeat(x, group // share, axis=0) for x in (tokens_PL, lengths_P)
        )
        with nn.sharding_resolver(strategy.resolver):
            tokens_RL = nn.constrain(tokens_RL, "batch", None)
            token_keys_B, noise_keys_B = sampling_keys(seed, indices_B)
            record = {
                "tokens": jnp.repeat(tokens_RL, share, axis=0),
                "lengths": jnp.repeat(lengths_R, share, axis=0),
            }
            draw_ids = functools.partial(
                sample_image_tokens,
                model,
                tokens_RL,
                lengths_R,
                settings=settings,
                image_ids=image_ids,
            )
            if trains_tokens(rl):
                drawn = draw_ids(keys_B=token_keys_B, group=share, return_support=True)
                hidden_BTD = drawn.hidden_BTD
                record |= {"image_ids": drawn.ids_BN, "logprobs": drawn.logprobs_BN}
                record |= {} if drawn.support_BNX is None else {"classes": drawn.support_BNX}
            else:  # a group has the image tokens of its first row: its images differ by what is trained alone
                drawn = draw_ids(keys_B=jnp.repeat(token_keys_B[::group], group // share, axis=0))
                hidden_BTD = jnp.repeat(drawn.hidden_BTD, share, axis=0)
            noise_BHWC = prepare_latents(cfg, noise_keys_B)
            velocity = guided(model, hidden_BTD, settings)
            with nn.part("dit"):
                if trains_flow(rl):
                    steps_key = jax.random.fold_in(
                        jax.random.fold_in(jax.random.key(seed), 2**32 - 1), rollout
                    )
                    steps_K = flow_grpo.choose_steps(
                        steps_key, rl.flow.steps, rl.flow.trained_steps
                    )
                    z_BHWC, kept = flow_grpo.sample_sde(
                        velocity,
                        noise_BHWC,
                        noise_keys_B,
                        steps_K,
                        steps=rl.flow.steps,
                        noise=rl.flow.noise_level,
                        flow=cfg.flow,
                    )
                    record |= {"hidden": hidden_BTD, "x": kept.x_BKHWC, "x_next": kept.next_BKHWC}
                    record["step"] = jnp.broadcast_to(kept.step_K, kept.logprob_BK.shape)
                    record["flow_logprobs"] = kept.logprob_BK
                else:
                    z_BHWC = sampler.euler(
                        velocity, noise_BHWC, steps=settings.steps, flow=cfg.flow
                    )
            return to_uint8(model.pixels(z_BHWC)), record

    return jax.jit(draw, out_shardings=strategy.batch_sharding())


def make_reference(
    config: Config, plan: StatePlan, strategy: Strategy, image_ids: tuple[int, int]
) -> Callable[[Any, Any, Record], Record]:
    """(reference's parameters, frozen, record) -> what the record lacks of the reference's."""
    rl = config.rl
    share = images_per_prefix(rl.num_generations, rl.num_prompts, strategy.batch_shards)

    def reference(params: Any, frozen: Any, record: Record) -> Record:
        model, found = plan.model(params, frozen), {}
        with nn.sharding_resolver(strategy.resolver):
            if trains_tokens(rl) and rl.kl_coef:
                found["reference_logprobs"], _ = token_logprobs(model, record, rl, image_ids, share)
            if trains_flow(rl) and rl.flow.kl_coef:
                found["reference_mean"], _ = flow_means(model, record, rl)
        return found

    return jax.jit(reference, out_shardings=strategy.batch_sharding())


def token_logprobs(
    model: Blip3o, record: Record, rl: RlConfig, image_ids: tuple[int, int], share: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the record's image tokens and entropies, float32 [B, N]. `share` rows
    have one reading of their prompt.
    """
    with nn.part("ar"):
        return score_image_tokens(
            model.ar,
            record["tokens"],
            record["lengths"],
            record["image_ids"],
            record.get("classes"),
            rl.rollout,
            image_ids=image_ids,
            chunk=rl.logits_chunk,
            group=share,
        )


def flow_means(model: Blip3o, record: Record, rl: RlConfig) -> tuple[jax.Array, jax.Array]:
    """Means [B, K, H, W, C] and deviations [B, K] of the record's denoising steps."""
    flow = model.cfg.flow
    velocity = guided(model, record["hidden"], rl.rollout)
    sigma_BK, next_BK = flow_grpo.step_sigmas(record["step"], steps=rl.flow.steps, flow=flow)

    def one(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x_BHWC, sigma_B, next_B = inputs
        with nn.part("dit"):
            v_BHWC = velocity(x_BHWC, sigma_B * flow.num_train_timesteps)
        return None, flow_grpo.transition(
            x_BHWC, v_BHWC, sigma_B, next_B, noise=rl.flow.noise_level
        )

    steps_first = jax.tree.map(lambda x: x.swapaxes(0, 1), (record["x"], sigma_BK, next_BK))
    _, found = jax.lax.scan(jax.checkpoint(one), None, steps_first)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), found)


def guided(
    model: Blip3o, hidden_BTD: jax.Array, settings: SamplingConfig
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The velocity that the sampler goes by."""
    guidance = model.guidance(hidden_BTD, settings)
    with nn.part("dit"):
        return sampler.guided_velocity(model.dit, guidance)


def chunks(cfg: RlConfig) -> int:
    """Draws that a rollout is made of: of at most `rollout.batch_size` images each, whole groups,
    equally many.
    """
    most = max(1, cfg.rollout.batch_size // cfg.num_generations)
    return next(
        n
        for n in range(math.ceil(cfg.num_prompts / most), cfg.num_prompts + 1)
        if cfg.num_prompts % n == 0
    )
