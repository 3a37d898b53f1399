"""Compute the log-probabilities of sampled image tokens under the current policy: those that
sampling computes token by token, in one pass over whole rows.

    row        p p p . . I_1 .. I_N        p prompt, its last token the scale tag; . padding;
                                           I image tokens
               p p p . . J_1 .. J_N        of the same prompt, whose prefill they share
    hidden     at the tag predicts I_1, at I_j predicts I_(j+1)

The distribution is the one sampled from: over image ids alone, at the temperature and guidance of
the rollout, and over its support, the ids that top-k and top-p allowed at sampling. With the
current support the ratio to the old policy would be 0 or infinite for a token that has crossed a
bound.

B images, L prompt length (padded), N image tokens, D width, V image ids, X bytes of V bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.ar.decoding import repeat_for_group
from blip3o_jax.ar.logits import project, scan_blocks
from blip3o_jax.ar.protocol import LanguageModel
from blip3o_jax.ar.sampling import cfg_segment_ids, guided_logits
from blip3o_jax.config import SamplingConfig


class TokenScores(NamedTuple):
    """Hold the scores of a rollout's image tokens."""

    logprobs_BN: jax.Array  # float32; of the tokens, as `SampleOutput.logprobs_BN` when sampled
    entropy_BN: jax.Array  # float32; of the distributions they were sampled from


def score_image_tokens(
    model: LanguageModel,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    ids_BN: jax.Array,
    support_BNX: jax.Array | None,
    settings: SamplingConfig,
    *,
    image_ids: tuple[int, int],
    chunk: int,
    group: int = 1,
) -> TokenScores:
    """Return log-probabilities of image tokens and entropies of their distributions. Prompts,
    ids and support as `generate_image_tokens` takes and returns them; `group` consecutive rows
    have the same prompt. `chunk` image tokens a row have their logits in memory at once; the
    backward pass computes them again.
    """
    hidden_BND = teacher_forced_states(
        model, tokens_BL, lengths_B, ids_BN, 1 if settings.token_guidance == 1.0 else 2, group
    )[:, :-1]
    head_DV = nn.constrain(model.head(image_ids).astype(hidden_BND.dtype), None, "act_vocab")

    def block(
        hidden_BCD: jax.Array, choice_BC: jax.Array, support_BCX: jax.Array | None
    ) -> tuple[None, tuple[jax.Array, jax.Array]]:
        logits_BCV = nn.constrain(project(hidden_BCD, head_DV), "batch", None, "act_vocab")
        logits_BCV = guided_logits(logits_BCV, settings.token_guidance) / settings.temperature
        if support_BCX is not None:
            support_BCV = jnp.unpackbits(support_BCX, axis=-1, count=logits_BCV.shape[-1]).astype(
                bool
            )
            # The sampled token is always in the support, so that its log-probability is finite.
            logits_BCV = jnp.where(support_BCV, logits_BCV, -jnp.inf)
        logprobs_BCV = jax.nn.log_softmax(logits_BCV)
        picked_BC = jnp.take_along_axis(logprobs_BCV, choice_BC[..., None], axis=-1)[..., 0]
        # p log p is 0 at p = 0; -inf times 0 would be NaN, in the gradient too.
        finite_BCV = jnp.where(jnp.isneginf(logprobs_BCV), 0.0, logprobs_BCV)
        return None, (picked_BC, -jnp.sum(jnp.exp(logprobs_BCV) * finite_BCV, axis=-1))

    with jax.named_scope("score"):
        inputs = (hidden_BND, ids_BN - image_ids[0], support_BNX)
        _, (logprobs_BN, entropy_BN) = scan_blocks(block, inputs, None, chunk=chunk)
    return TokenScores(logprobs_BN, entropy_BN)


def teacher_forced_states(
    model: LanguageModel,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    ids_BN: jax.Array,
    cfg_branches: int,
    group: int = 1,
) -> jax.Array:
    """Return the hidden states at the scale tag and at every image token [B, N + 1, D]: each but
    the last predicts the next token. With two branches [2 B, N + 1, D], next to each other.
    """
    # The rows of a group have one prompt: its first row stands for all.
    first = lambda x: x.reshape(-1, group, *x.shape[1:])[:, 0]
    tokens_PL, lengths_P = first(tokens_BL), first(lengths_B)
    repeat_for_cfg = lambda x: jnp.repeat(x, cfg_branches, axis=0)
    hidden_PLD, hidden_BND = model.score_with_prefix(
        model.embed(repeat_for_cfg(tokens_PL)),
        cfg_segment_ids(lengths_P, tokens_PL.shape[1], cfg_branches),
        model.embed(repeat_for_cfg(ids_BN)),
        lambda x: repeat_for_group(x, group, cfg_branches),
    )
    tag_P1D = jnp.take_along_axis(
        hidden_PLD, (repeat_for_cfg(lengths_P) - 1)[:, None, None], axis=1
    )
    return jnp.concatenate([repeat_for_group(tag_P1D, group, cfg_branches), hidden_BND], axis=1)
