"""Sample image tokens and text: prefill the prompts, then decode token by token on the cache in one
compiled loop.

Logits l cover the image ids alone, at temperature t. With classifier-free guidance g they are l = u
+ g (c - u), of the conditional logits c (given the prompt) and the unconditional logits u (given
the image tokens only; arXiv 2306.17806):

    p = softmax(l / t), truncated to the top_k most likely ids, then to the shortest prefix
        of mass >= top_p of the renormalised rest

An id is sampled by the Gumbel-max rule with noise that belongs to (row key, token index, image id).
So a row's ids depend on its own prompt and key only, and rounding that swaps the ranks of two
almost equal candidates does not change the sample.

B batch, L prompt length (padded), N image tokens, D width, V image ids, C candidates kept by top-k,
X bytes of V bits; P prompts of G images each where one prefill serves several images, B = P G.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax.ar.decoding import DecodingState, TextDecodingState, decode, prefill
from blip3o_jax.ar.logits import project
from blip3o_jax.ar.protocol import LanguageModel


class SampleOutput(NamedTuple):
    """Hold sampled image tokens and the states they were sampled from.

    `hidden_BTD` [B, N + 1, D]: the final-norm states at the scale tag and at each image token, the
    condition of the diffusion head. `logprobs_BN`: log-probabilities under the truncated
    distribution (0 at temperature 0), float32. `support_BNX`, where requested: the support of that
    distribution, one bit a class (`jnp.packbits`), or None for all classes.
    """

    ids_BN: jax.Array
    hidden_BTD: jax.Array
    logprobs_BN: jax.Array
    support_BNX: jax.Array | None = None


def generate_image_tokens(
    model: LanguageModel,
    tokens_PL: jax.Array,
    lengths_P: jax.Array,
    keys_B: jax.Array,
    *,
    num_tokens: int,
    image_ids: tuple[int, int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    group: int = 1,
    return_support: bool = False,
    embedded_PLD: jax.Array | None = None,
) -> SampleOutput:
    """Sample `num_tokens` image tokens after each prompt.

    `tokens_PL` are prompts padded on the right; a prompt's last token, at lengths_P - 1, opens the
    image (its scale tag). `embedded_PLD` replaces their embeddings where some are not embeddings of
    tokens. `image_ids` is (first, last + 1); no other id is sampled. `keys_B` are typed PRNG keys,
    one an image: rows p G to p G + G - 1 are the `group` G of prompt p, which share its prefill.
    Temperature 0 takes the most likely id; top_k 0, top_p 1 and guidance 1 switch these off. Call
    it under `jax.jit`, with the keyword arguments static.
    """
    _check(model, num_tokens, image_ids, temperature, top_k, top_p)
    model = _cast_params(model)
    # With guidance, P and B count two branches per row from here on. They are adjacent, so that
    # both are on the row's device.
    L = tokens_PL.shape[1]
    cfg_branches = 1 if guidance == 1.0 else 2
    repeat_for_cfg = lambda x: jnp.repeat(x, cfg_branches, axis=0)
    segments_PL = cfg_segment_ids(lengths_P, L, cfg_branches)
    embedded_PLD = repeat_for_cfg(model.embed(tokens_PL) if embedded_PLD is None else embedded_PLD)
    prompts, layers = prefill(
        model, embedded_PLD, segments_PL, repeat_for_cfg(lengths_P), L + num_tokens
    )
    # Outside the loop: XLA does not always hoist the slice, and a slice of a large table costs more
    # than the rest of a step.
    head_DV = model.head(image_ids)
    start = prompts.repeat_for_group(group, cfg_branches)

    def step(state: DecodingState, index: jax.Array) -> tuple[DecodingState, tuple]:
        # The key of a token depends on (row key, index), not on a split of the previous key: any
        # token's noise can be recomputed alone, and the batch's composition has no influence.
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
        logits_BV = guided_logits(project(state.hidden_BD, head_DV), guidance)
        choice_B, logprob_B, support_BV = sample_token(
            logits_BV, keys, temperature=temperature, top_k=top_k, top_p=top_p
        )
        ids_B = image_ids[0] + choice_B
        # Both branches continue with the same sampled token: guidance combines their logits for one
        # image.
        state = decode(model, state, repeat_for_cfg(ids_B), layers)
        support_BX = (
            # One bit a class: the support of all tokens in bool would be 729 x 65536 bytes an
            # image.
            jnp.packbits(support_BV, axis=-1) if return_support and support_BV is not None else None
        )
        return state, (ids_B, state.hidden_BD[::cfg_branches], logprob_B, support_BX)

    with jax.named_scope("decode"):
        _, (ids_NB, hidden_NBD, logprobs_NB, support_NBX) = jax.lax.scan(
            step, start, jnp.arange(num_tokens)
        )
    # N + 1 states: that of the scale tag, which predicted the first token, and that of every image
    # token. The tokens' states are computed by decoding anyway, so that no second pass is needed
    # for the condition.
    hidden_BND = jnp.concatenate(
        [start.hidden_BD[::cfg_branches, None], hidden_NBD.swapaxes(0, 1)], axis=1
    )
    support_BNX = None if support_NBX is None else support_NBX.swapaxes(0, 1)
    return SampleOutput(ids_NB.T, hidden_BND, logprobs_NB.T, support_BNX)


class TextOutput(NamedTuple):
    """Hold sampled text: ids [B, N] and the number of valid ids of each row, the stop token not
    counted. Ids past that number are undefined.
    """

    ids_BN: jax.Array
    count_B: jax.Array


def generate_text(
    model: LanguageModel,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    *,
    max_new_tokens: int,
    text_ids: tuple[int, int],
    stop: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    embedded_BLD: jax.Array | None = None,
) -> TextOutput:
    """Sample up to `max_new_tokens` text tokens after each prompt, until all rows have sampled
    `stop`. `text_ids` is (first, last + 1), with `stop` among them; other arguments are those of
    `generate_image_tokens`.
    """
    _check(model, max_new_tokens, text_ids, temperature, top_k, top_p)
    model = _cast_params(model)
    B, L = tokens_BL.shape
    embedded_BLD = model.embed(tokens_BL) if embedded_BLD is None else embedded_BLD
    start, layers = prefill(
        model, embedded_BLD, cfg_segment_ids(lengths_B, L, 1), lengths_B, L + max_new_tokens
    )
    head_DV = model.head(text_ids)

    def cond(state: TextDecodingState) -> jax.Array:
        return (state.index < max_new_tokens) & jnp.any(state.active_B)

    def step(state: TextDecodingState) -> TextDecodingState:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.index)
        choice_B, _, _ = sample_token(
            project(state.decoding.hidden_BD, head_DV),
            keys,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        next_B = text_ids[0] + choice_B
        # Rows that are done go on computing until all are, with their ids ignored: the batch has a
        # static shape.
        active_B = state.active_B & (next_B != stop)
        return TextDecodingState(
            state.index + 1,
            decode(model, state.decoding, next_B, layers),
            state.ids_BN.at[:, state.index].set(next_B),
            active_B,
            # Counted after the stop test, so that the stop token itself is left out.
            state.count_B + active_B,
        )

    with jax.named_scope("decode"):
        ids_BN, count_B = jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32)
        nothing = TextDecodingState(jnp.int32(0), start, ids_BN, jnp.ones(B, bool), count_B)
        end = jax.lax.while_loop(cond, step, nothing)
    return TextOutput(end.ids_BN, end.count_B)


def cfg_segment_ids(lengths_P: jax.Array, length: int, cfg_branches: int) -> jax.Array:
    """Return the segment ids of prompts padded to `length`: int32 [P, L], or [2 P, L] where every
    second row is the unconditional branch, which sees the scale tag only.
    """
    # The unconditional branch masks the prompt as padding. Its scale tag is at position 0 then, and
    # at the prompt's end in training (rows.mask_prompts): rotary embeddings depend on differences
    # of positions only.
    index_L, last_P1 = jnp.arange(length), lengths_P[:, None] - 1
    cond_PL = (index_L <= last_P1).astype(jnp.int32)
    if cfg_branches == 1:
        return cond_PL
    uncond_PL = (index_L == last_P1).astype(jnp.int32)
    return jnp.stack([cond_PL, uncond_PL], axis=1).reshape(-1, length)


def guided_logits(logits: jax.Array, guidance: float) -> jax.Array:
    """Combine the logits [2 B, ..., V] of both branches, next to each other, into [B, ..., V];
    return them unchanged at guidance 1, which has no unconditional branch.
    """
    if guidance == 1.0:
        return logits
    cond, uncond = jnp.unstack(logits.reshape(-1, 2, *logits.shape[1:]), axis=1)
    return uncond + guidance * (cond - uncond)


def sample_token(
    logits_BV: jax.Array, keys_B: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Sample one class a row -> (class [B] int32, its log-probability [B] under the truncated
    distribution, the support [B, V] of that distribution or None for all classes).
    """
    B, V = logits_BV.shape
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), jnp.zeros(B, jnp.float32), None
    classes_BC, logprobs_BC = truncate(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
    # Noise for all V classes, gathered for the C candidates: the noise of a class does not depend
    # on its rank among the candidates.
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(keys_B)
    noise_BC = jnp.take_along_axis(noise_BV, classes_BC, axis=-1)
    winner_B1 = jnp.argmax(logprobs_BC + noise_BC, axis=-1, keepdims=True)
    pick = lambda x_BC: jnp.take_along_axis(x_BC, winner_B1, axis=-1)[:, 0]
    # The support is all classes: None saves an array [B, V].
    if (top_k or V) >= V and top_p == 1.0:
        return pick(classes_BC), pick(logprobs_BC), None
    rows_B1 = jnp.arange(B)[:, None]
    support_BV = jnp.zeros((B, V), bool).at[rows_B1, classes_BC].set(logprobs_BC > -jnp.inf)
    return pick(classes_BC), pick(logprobs_BC), support_BV


def truncate(
    logits_BV: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """Apply temperature, top-k and top-p -> (classes [B, C] int32, log-probabilities [B, C]
    float32, -inf outside top-p).

    C is top_k, or V when top-k is off. Sorted by falling probability when either truncation is on.
    Of classes tied at the k-th place the lower index is kept.
    """
    B, V = logits_BV.shape
    # Temperature before truncation, as in transformers' order of logits warpers: top-p then
    # measures the mass of the distribution that is sampled.
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    top_k = min(top_k or V, V)
    if top_k == V and top_p == 1.0:
        return jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (B, V)), jax.nn.log_softmax(
            logits_BV
        )
    # top_k first: top-p then needs a sort of k values instead of the whole codebook.
    logits_BC, classes_BC = jax.lax.top_k(logits_BV, top_k)
    if top_p < 1.0:
        probs_BC = jax.nn.softmax(logits_BC)
        # The mass before a class, without it: the class that crosses `top_p` is kept, so that the
        # kept mass is at least top_p.
        mass_before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
        # The most likely class is kept for every top_p.
        kept_BC = (mass_before_BC < top_p) | (jnp.arange(top_k) == 0)
        logits_BC = jnp.where(kept_BC, logits_BC, -jnp.inf)
    # Renormalised over the classes that are left: these are the log-probabilities of the
    # distribution that is sampled, which the on-policy ratio of RL needs.
    return classes_BC, jax.nn.log_softmax(logits_BC)


def _check(
    model: LanguageModel,
    num_tokens: int,
    image_ids: tuple[int, int],
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    first, last = image_ids
    problems = {
        f"num_tokens={num_tokens} must be positive": num_tokens < 1,
        f"image_ids={image_ids} must be (first, last + 1) within the vocabulary of "
        f"{model.cfg.vocab_size}": not (0 <= first < last <= model.cfg.vocab_size),
        f"temperature={temperature} must be 0 (greedy) or more": temperature < 0,
        f"top_k={top_k} must be 0 (off) or more": top_k < 0,
        f"top_p={top_p} must lie in (0, 1]; 1 switches it off": not 0 < top_p <= 1,
    }
    for message, found in problems.items():
        if found:
            raise ValueError(f"sampling: {message}")


def _cast_params(model: LanguageModel) -> LanguageModel:
    """Return the model with its parameters cast to the compute dtype once, not at every token:
    decoding is bound by reading them. Every use of a parameter casts to this dtype anyway, so no
    number changes.
    """
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(model.cfg.dtype), state))
