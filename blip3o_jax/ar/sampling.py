"""Drawing image tokens, and text: one pass over the prompts, then one compiled loop of single-token
steps on the cache.

From logits l over the image ids alone, at temperature t; with guidance g they are l = u + g (c -
u), of the logits c given the prompt and u given the image tokens alone (arXiv 2306.17806):

    p = softmax(l / t);  keep the top_k most likely;  of those, renormalised, keep the shortest prefix of mass >= top_p

An id is drawn by the Gumbel-max rule with noise that belongs to (row key, token index, image id).
So a row's ids depend on its own prompt and key only, and rounding that swaps two almost equal
candidates' ranks does not change what is drawn.

B batch, L prompt length (padded), N image tokens, D width, V image ids, C candidates kept by top-k;
P prompts of G images each where a prompt is read once for several images, B = P G.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar import cache
from blip3o_jax.ar.qwen3 import Qwen3, project


class Drawn(NamedTuple):
    """`hidden_BTD` [B, N + 1, D]: the final-norm states at the scale tag and at each image token,
    the condition of the diffusion head. `logprobs_BN` are those of the truncated distribution that
    was drawn from (0 at temperature 0), float32. `kept_BNX`, where asked for: which classes that
    distribution held, one bit each (`jnp.packbits`), or None for all.
    """

    ids_BN: jax.Array
    hidden_BTD: jax.Array
    logprobs_BN: jax.Array
    kept_BNX: jax.Array | None = None


def generate_image_tokens(
    model: Qwen3,
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
    keep_classes: bool = False,
    embedded_PLD: jax.Array | None = None,
) -> Drawn:
    """Draw `num_tokens` image tokens after each prompt.

    `tokens_PL` are prompts padded on the right; a prompt's last token, at lengths_P - 1, opens the
    image (its scale tag). `embedded_PLD` stands for their embeddings where these are not all
    tokens'. `image_ids` is (first, last + 1); no other id can be drawn. `keys_B` are typed PRNG
    keys, one an image: rows p G to p G + G - 1 are prompt p's `group` G, which share its reading.
    Temperature 0 takes the most likely id; top_k 0, top_p 1 and guidance 1 switch these off. Meant
    to be called under `jax.jit`, keyword arguments static.
    """
    _check(model, num_tokens, image_ids, temperature, top_k, top_p)
    model = _in_compute_dtype(model)
    # With guidance P and B count two branches a row from here on, which lie next to each other, so
    # that both are on its device.
    L, branches = tokens_PL.shape[1], 1 if guidance == 1.0 else 2
    twin = lambda x: jnp.repeat(x, branches, axis=0)
    segments_PL = branch_segments(lengths_P, L, branches)
    embedded_PLD = twin(model.embed(tokens_PL) if embedded_PLD is None else embedded_PLD)
    scale_PD, past, layers = _read(
        model, embedded_PLD, segments_PL, twin(lengths_P), L + num_tokens
    )
    # Outside the loop: XLA does not always hoist the slice, and a slice of a large table costs more
    # than the rest of a step.
    head_DV = model.head(image_ids)
    scale_BD, past = (
        for_each(scale_PD, group, branches),
        cache.repeat(past, lambda x: for_each(x, group, branches)),
    )

    def step(carry: tuple[jax.Array, cache.Cache], index: jax.Array) -> tuple[tuple, tuple]:
        hidden_BD, past = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
        logits_BV = guided(project(hidden_BD, head_DV), guidance)
        choice_B, logprob_B, kept_BV = draw(
            logits_BV, keys, temperature=temperature, top_k=top_k, top_p=top_p
        )
        ids_B = image_ids[0] + choice_B
        next_B1 = twin(ids_B[:, None])
        hidden_B1D, past = model.extend(model.embed(next_B1), jnp.ones_like(next_B1), past, layers)
        kept_BX = jnp.packbits(kept_BV, axis=-1) if keep_classes and kept_BV is not None else None
        return (hidden_B1D[:, 0], past), (ids_B, hidden_B1D[::branches, 0], logprob_B, kept_BX)

    with jax.named_scope("decode"):
        _, (ids_NB, hidden_NBD, logprobs_NB, kept_NBX) = jax.lax.scan(
            step, (scale_BD, past), jnp.arange(num_tokens)
        )
    hidden_BND = jnp.concatenate([scale_BD[::branches, None], hidden_NBD.swapaxes(0, 1)], axis=1)
    kept_BNX = None if kept_NBX is None else kept_NBX.swapaxes(0, 1)
    return Drawn(ids_NB.T, hidden_BND, logprobs_NB.T, kept_BNX)


class Written(NamedTuple):
    """`ids_BN` [B, N], and of each row how many there are, the stop token not counted; what comes
    after means nothing.
    """

    ids_BN: jax.Array
    count_B: jax.Array


def generate_text(
    model: Qwen3,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    *,
    most: int,
    text_ids: tuple[int, int],
    stop: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    embedded_BLD: jax.Array | None = None,
) -> Written:
    """Up to `most` text tokens after each prompt, till all rows have written `stop`. `text_ids` is
    (first, last + 1), with `stop` among them; other arguments as of `generate_image_tokens`.
    """
    _check(model, most, text_ids, temperature, top_k, top_p)
    model = _in_compute_dtype(model)
    B, L = tokens_BL.shape
    embedded_BLD = model.embed(tokens_BL) if embedded_BLD is None else embedded_BLD
    hidden_BD, past, layers = _read(
        model, embedded_BLD, branch_segments(lengths_B, L, 1), lengths_B, L + most
    )
    head_DV = model.head(text_ids)

    def going(carry: tuple[Any, ...]) -> jax.Array:
        index, _, _, _, open_B, _ = carry
        return (index < most) & jnp.any(open_B)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, hidden_BD, past, ids_BN, open_B, count_B = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
        choice_B, _, _ = draw(
            project(hidden_BD, head_DV), keys, temperature=temperature, top_k=top_k, top_p=top_p
        )
        next_B = text_ids[0] + choice_B
        open_B &= next_B != stop
        hidden_B1D, past = model.extend(
            model.embed(next_B[:, None]), jnp.ones((B, 1), jnp.int32), past, layers
        )
        return (
            index + 1,
            hidden_B1D[:, 0],
            past,
            ids_BN.at[:, index].set(next_B),
            open_B,
            count_B + open_B,
        )

    with jax.named_scope("decode"):
        ids_BN, count_B = jnp.zeros((B, most), jnp.int32), jnp.zeros(B, jnp.int32)
        carry = (jnp.int32(0), hidden_BD, past, ids_BN, jnp.ones(B, bool), count_B)
        *_, ids_BN, _, count_B = jax.lax.while_loop(going, step, carry)
    return Written(ids_BN, count_B)


def _read(
    model: Qwen3,
    embedded_PLD: jax.Array,
    segments_PL: jax.Array,
    lengths_P: jax.Array,
    capacity: int,
) -> tuple[jax.Array, cache.Cache, Any]:
    """The prompts' last hidden states [P, D], what is kept of them, and the layers as the loop
    after takes them.
    """
    past = cache.empty(model.cfg, len(embedded_PLD), capacity)
    layers = nn.unstack(model.layers) if model.cfg.unroll else None
    with jax.named_scope("prefill"):
        hidden_PLD, past = model.extend(embedded_PLD, segments_PL, past, layers)
    return (
        jnp.take_along_axis(hidden_PLD, (lengths_P - 1)[:, None, None], axis=1)[:, 0],
        past,
        layers,
    )


def branch_segments(lengths_P: jax.Array, length: int, branches: int) -> jax.Array:
    """Segment ids of prompts padded to `length`: int32 [P, L], or [2 P, L] with every second row
    the branch that sees the scale tag alone.
    """
    index_L, last_P1 = jnp.arange(length), lengths_P[:, None] - 1
    given_PL = (index_L <= last_P1).astype(jnp.int32)
    if branches == 1:
        return given_PL
    alone_PL = (index_L == last_P1).astype(jnp.int32)
    return jnp.stack([given_PL, alone_PL], axis=1).reshape(-1, length)


def guided(logits: jax.Array, guidance: float) -> jax.Array:
    """[2 B, ..., V] of both branches, next to each other -> [B, ..., V]; as it is where guidance 1
    has no second one.
    """
    if guidance == 1.0:
        return logits
    given, alone = jnp.unstack(logits.reshape(-1, 2, *logits.shape[1:]), axis=1)
    return alone + guidance * (given - alone)


def for_each(x: jax.Array, group: int, branches: int) -> jax.Array:
    """Rows of prompts -> of their images, branches side by side."""
    if group == 1:
        return x
    return jnp.repeat(x.reshape(-1, branches, *x.shape[1:]), group, axis=0).reshape(
        -1, *x.shape[1:]
    )


def draw(
    logits_BV: jax.Array, keys_B: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """One draw a row -> (class [B] int32, its log-probability [B] under the distribution drawn
    from, the classes [B, V] that this held or None for all).
    """
    B, V = logits_BV.shape
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), jnp.zeros(B, jnp.float32), None
    classes_BC, logprobs_BC = truncate(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(keys_B)
    noise_BC = jnp.take_along_axis(noise_BV, classes_BC, axis=-1)
    winner_B1 = jnp.argmax(logprobs_BC + noise_BC, axis=-1, keepdims=True)
    pick = lambda x_BC: jnp.take_along_axis(x_BC, winner_B1, axis=-1)[:, 0]
    if (top_k or V) >= V and top_p == 1.0:
        return pick(classes_BC), pick(logprobs_BC), None
    rows_B1 = jnp.arange(B)[:, None]
    kept_BV = jnp.zeros((B, V), bool).at[rows_B1, classes_BC].set(logprobs_BC > -jnp.inf)
    return pick(classes_BC), pick(logprobs_BC), kept_BV


def truncate(
    logits_BV: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """The distribution drawn from -> (classes [B, C] int32, log-probabilities [B, C] float32, -inf
    outside top-p).

    C is top_k, or V when top-k is off. Sorted by falling probability when either truncation is on.
    Of classes tied at the k-th place the lower index is kept.
    """
    B, V = logits_BV.shape
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    top_k = min(top_k or V, V)
    if top_k == V and top_p == 1.0:
        return jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (B, V)), jax.nn.log_softmax(
            logits_BV
        )
    # The k largest first: the sort that top-p needs is then over k values, not over the whole
    # codebook.
    logits_BC, classes_BC = jax.lax.top_k(logits_BV, top_k)
    if top_p < 1.0:
        probs_BC = jax.nn.softmax(logits_BC)
        mass_before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
        # The likeliest class stays whatever top_p is.
        kept_BC = (mass_before_BC < top_p) | (jnp.arange(top_k) == 0)
        logits_BC = jnp.where(kept_BC, logits_BC, -jnp.inf)
    return classes_BC, jax.nn.log_softmax(logits_BC)


def _check(
    model: Qwen3,
    num_tokens: int,
    image_ids: tuple[int, int],
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
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
    """The model with parameters cast once, not at every token: decoding is bound by reading them.
    Every use of a parameter casts to this dtype anyway, so no number changes.
    """
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(model.cfg.dtype), state))
