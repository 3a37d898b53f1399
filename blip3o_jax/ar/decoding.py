"""Define the state of decoding: the carry of the token loop.

A prompt is prefilled once; then each step computes the logits of the last token's hidden state,
samples a token, and runs it on the cache. The loop over image tokens carries a `DecodingState`, the
loop over text a `TextDecodingState`. Reinforcement learning samples with the former and scores with
`score_with_prefix`, which returns the hidden states of the same positions.

B rows of the batch (with classifier-free guidance two per prompt, adjacent), N new tokens, D width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax.ar import cache
from blip3o_jax.ar.protocol import LanguageModel


class DecodingState(NamedTuple):
    """Hold the state of a batch's rows between two tokens."""

    hidden_BD: jax.Array  # final-norm state of each row's last token, which predicts the next
    cache: cache.Cache  # keys and values of all tokens so far

    def repeat_for_group(self, group: int, cfg_branches: int) -> "DecodingState":
        """Return the state of `group` rows per prompt, from that of one; see the function."""
        rows = lambda x: repeat_for_group(x, group, cfg_branches)
        return DecodingState(rows(self.hidden_BD), cache.repeat(self.cache, rows))


class TextDecodingState(NamedTuple):
    """Hold the state of a batch's rows while text is sampled."""

    # int32 scalar; steps done, which is the place of the next token in `ids_BN`. The field hides
    # `tuple.index`, which has no use here.
    index: jax.Array  # type: ignore[assignment]
    decoding: DecodingState
    ids_BN: jax.Array  # int32; what was sampled, 0 from `index` on
    active_B: jax.Array  # bool; no stop token yet
    count_B: jax.Array  # int32; tokens before the stop token


def prefill(
    model: LanguageModel,
    embedded_BLD: jax.Array,
    segment_ids_BL: jax.Array,
    lengths_B: jax.Array,
    capacity: int,
) -> tuple[DecodingState, Any]:
    """Run the prompts on an empty cache of `capacity` slots.

    Returns (state after each row's last token, at lengths_B - 1; the layers for `decode`, as
    `start_decoding` returns them).
    """
    past, layers = model.start_decoding(len(embedded_BLD), capacity)
    with jax.named_scope("prefill"):
        hidden_BLD, past = model.extend(embedded_BLD, segment_ids_BL, past, layers)
    # Prompts are padded on the right, so that the last token is at a different slot in every row.
    last_B11 = (lengths_B - 1)[:, None, None]
    return DecodingState(jnp.take_along_axis(hidden_BLD, last_B11, axis=1)[:, 0], past), layers


def decode(
    model: LanguageModel, state: DecodingState, ids_B: jax.Array, layers: Any
) -> DecodingState:
    """Return the state after one more token a row; `layers` as of `prefill`."""
    ids_B1 = ids_B[:, None]
    hidden_B1D, past = model.extend(model.embed(ids_B1), jnp.ones_like(ids_B1), state.cache, layers)
    return DecodingState(hidden_B1D[:, 0], past)


def repeat_for_group(x: jax.Array, group: int, cfg_branches: int) -> jax.Array:
    """Repeat the rows of prompts for the images of their groups, branches side by side."""
    if group == 1:
        return x
    # The branches of a row stay adjacent: [cond, uncond] of prompt p becomes G pairs in a row, the
    # layout that `guided_logits` splits.
    return jnp.repeat(x.reshape(-1, cfg_branches, *x.shape[1:]), group, axis=0).reshape(
        -1, *x.shape[1:]
    )
