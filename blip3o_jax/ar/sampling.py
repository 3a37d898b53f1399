"""Drawing image tokens: one pass over the prompts, then one compiled loop of single-token steps on the cache.

From logits l over the image ids alone, at temperature t; with guidance g they are l = u + g (c - u), of the logits c given
the prompt and u given the image tokens alone (arXiv 2306.17806):

    p = softmax(l / t);  keep the top_k most likely;  of those, renormalised, keep the shortest prefix of mass >= top_p

An id is drawn by the Gumbel-max rule with noise that belongs to (row key, token index, image id). So a row's ids depend on its
own prompt and key only, and rounding that swaps two almost equal candidates' ranks does not change what is drawn.

B batch, L prompt length (padded), N image tokens, D width, V image ids, C candidates kept by top-k.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar import cache
from blip3o_jax.ar.qwen3 import Qwen3, project


def generate_image_tokens(
    model: Qwen3,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    *,
    num_tokens: int,
    image_ids: tuple[int, int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw `num_tokens` image tokens after each prompt -> (ids [B, N] int32, hidden [B, N + 1, D], logprobs [B, N] float32).

    `tokens_BL` are prompts padded on the right; row b's last token, at lengths_B[b] - 1, opens the image (its scale tag).
    `image_ids` is (first, last + 1); no other id can be drawn. `keys_B` are typed PRNG keys, one a row. Temperature 0 takes
    the most likely id; top_k 0, top_p 1 and guidance 1 switch these off. `hidden` are the final-norm states at the scale tag
    and at each image token: the condition of the diffusion head. `logprobs` are those of the truncated distribution
    that was drawn from (0 at temperature 0). Meant to be called under `jax.jit`, keyword arguments static.
    """
    _check(model, num_tokens, image_ids, temperature, top_k, top_p)
    model = _in_compute_dtype(model)
    # With guidance B counts two branches a row from here on, which lie next to each other, so that both are on its device.
    L, branches = tokens_BL.shape[1], 1 if guidance == 1.0 else 2
    twin = lambda x: jnp.repeat(x, branches, axis=0)
    index_L, last_B1 = jnp.arange(L), lengths_B[:, None] - 1
    segments_BL = (index_L <= last_B1).astype(jnp.int32)
    if branches == 2:
        alone_BL = (index_L == last_B1).astype(jnp.int32)
        segments_BL = jnp.stack([segments_BL, alone_BL], axis=1).reshape(-1, L)
    tokens_BL, lengths_B = twin(tokens_BL), twin(lengths_B)
    past = cache.empty(model.cfg, len(tokens_BL), L + num_tokens)
    layers = nn.unstack(model.layers) if model.cfg.unroll else None
    with jax.named_scope("prefill"):
        hidden_BLD, past = model.extend(model.embed(tokens_BL), segments_BL, past, layers)
    # Outside the loop: XLA does not always hoist the slice, and a slice of a large table costs more than the rest of a step.
    head_DV = model.head(image_ids)
    scale_BD = jnp.take_along_axis(hidden_BLD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]

    def step(carry: tuple[jax.Array, cache.Cache], index: jax.Array) -> tuple[tuple, tuple]:
        hidden_BD, past = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
        logits_BV = project(hidden_BD, head_DV)
        if branches == 2:
            given_BV, alone_BV = jnp.unstack(logits_BV.reshape(-1, 2, logits_BV.shape[-1]), axis=1)
            logits_BV = alone_BV + guidance * (given_BV - alone_BV)
        choice_B, logprob_B = draw(logits_BV, keys, temperature=temperature, top_k=top_k, top_p=top_p)
        ids_B = image_ids[0] + choice_B
        next_B1 = twin(ids_B[:, None])
        hidden_B1D, past = model.extend(model.embed(next_B1), jnp.ones_like(next_B1), past, layers)
        return (hidden_B1D[:, 0], past), (ids_B, hidden_B1D[::branches, 0], logprob_B)

    with jax.named_scope("decode"):
        _, (ids_NB, hidden_NBD, logprobs_NB) = jax.lax.scan(step, (scale_BD, past), jnp.arange(num_tokens))
    hidden_BND = jnp.concatenate([scale_BD[::branches, None], hidden_NBD.swapaxes(0, 1)], axis=1)
    return ids_NB.T, hidden_BND, logprobs_NB.T


def draw(
    logits_BV: jax.Array, keys_B: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """One draw a row -> (class [B] int32, its log-probability [B] under the distribution drawn from)."""
    B, V = logits_BV.shape
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), jnp.zeros(B, jnp.float32)
    classes_BC, logprobs_BC = truncate(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(keys_B)
    noise_BC = jnp.take_along_axis(noise_BV, classes_BC, axis=-1)
    winner_B1 = jnp.argmax(logprobs_BC + noise_BC, axis=-1, keepdims=True)
    pick = lambda x_BC: jnp.take_along_axis(x_BC, winner_B1, axis=-1)[:, 0]
    return pick(classes_BC), pick(logprobs_BC)


def truncate(logits_BV: jax.Array, *, temperature: float, top_k: int, top_p: float) -> tuple[jax.Array, jax.Array]:
    """The distribution drawn from -> (classes [B, C] int32, log-probabilities [B, C] float32, -inf outside top-p).

    C is top_k, or V when top-k is off. Sorted by falling probability when either truncation is on. Of classes tied at the
    k-th place the lower index is kept.
    """
    B, V = logits_BV.shape
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    top_k = min(top_k or V, V)
    if top_k == V and top_p == 1.0:
        return jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (B, V)), jax.nn.log_softmax(logits_BV)
    # The k largest first: the sort that top-p needs is then over k values, not over the whole codebook.
    logits_BC, classes_BC = jax.lax.top_k(logits_BV, top_k)
    if top_p < 1.0:
        probs_BC = jax.nn.softmax(logits_BC)
        mass_before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
        # The likeliest class stays whatever top_p is.
        kept_BC = (mass_before_BC < top_p) | (jnp.arange(top_k) == 0)
        logits_BC = jnp.where(kept_BC, logits_BC, -jnp.inf)
    return classes_BC, jax.nn.log_softmax(logits_BC)


def _check(model: Qwen3, num_tokens: int, image_ids: tuple[int, int], temperature: float, top_k: int, top_p: float) -> None:
    first, last = image_ids
    problems = {
        f"num_tokens={num_tokens} must be positive": num_tokens < 1,
        f"image_ids={image_ids} must be (first, last + 1) within the vocabulary of {model.cfg.vocab_size}": not (
            0 <= first < last <= model.cfg.vocab_size
        ),
        f"temperature={temperature} must be 0 (greedy) or more": temperature < 0,
        f"top_k={top_k} must be 0 (off) or more": top_k < 0,
        f"top_p={top_p} must lie in (0, 1]; 1 switches it off": not 0 < top_p <= 1,
    }
    for message, found in problems.items():
        if found:
            raise ValueError(f"sampling: {message}")


def _in_compute_dtype(model: Qwen3) -> Qwen3:
    """The model with parameters cast once, not at every token: decoding is bound by reading them. Every use of a parameter
    casts to this dtype anyway, so no number changes."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(model.cfg.dtype), state))
