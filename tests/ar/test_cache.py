import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip3o_jax import config
from blip3o_jax.ar import cache
from blip3o_jax.ar.qwen3 import Qwen3
from tests.conftest import relative_error

CFG = config.Qwen3Config(
    vocab_size=60,
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.15,
    vocab_multiple=16,
    dtype="float32",
    remat="none",
)
LENGTHS, L, STEPS = np.array([7, 4, 1]), 7, 5


@pytest.fixture(scope="module", params=[False, True], ids=["scanned", "unrolled"])
def model(request) -> Qwen3:
    return Qwen3(dataclasses.replace(CFG, unroll=request.param), rngs=nnx.Rngs(0))


@nnx.jit
def full(model: Qwen3, tokens_BL: jax.Array) -> jax.Array:
    B, L = tokens_BL.shape
    return model(
        model.embed(tokens_BL), jnp.broadcast_to(jnp.arange(L), (B, L)), jnp.ones((B, L), jnp.int32)
    )


@nnx.jit
def extend(model: Qwen3, tokens_BL: jax.Array, segments_BL: jax.Array, past: cache.Cache):
    return model.extend(model.embed(tokens_BL), segments_BL, past)


def test_cached_decode_equals_the_full_forward_for_prompts_of_different_lengths(model, rng):
    rows = [rng.integers(0, CFG.vocab_size, length + STEPS) for length in LENGTHS]
    prompts = np.stack(
        [
            np.pad(row[:n], (0, L - n), constant_values=9)
            for row, n in zip(rows, LENGTHS, strict=True)
        ]
    )
    segments = (np.arange(L) < LENGTHS[:, None]).astype(np.int32)
    hidden, past = extend(model, prompts, segments, cache.empty(model.cfg, 3, L + STEPS))
    got = [[hidden[b, : LENGTHS[b]]] for b in range(3)]
    for step in range(STEPS):
        new = np.array([row[n + step] for row, n in zip(rows, LENGTHS, strict=True)])
        hidden, past = extend(model, new[:, None], np.ones((3, 1), np.int32), past)
        for b in range(3):
            got[b].append(hidden[b])
    assert np.array_equal(past.lengths_B, LENGTHS + STEPS) and int(past.end) == L + STEPS
    for b, row in enumerate(rows):
        # Each row alone and unpadded. Sums over a different number of slots round differently, by
        # some 1e-7.
        padded = np.pad(row, (0, L + STEPS - len(row)))[None]
        assert relative_error(np.concatenate(got[b]), full(model, padded)[0, : len(row)]) < 1e-5


def test_a_prompt_given_in_two_chunks_equals_one(model, rng):
    tokens, ones = rng.integers(0, CFG.vocab_size, (2, 8)), np.ones((2, 8), np.int32)
    first, past = extend(model, tokens[:, :5], ones[:, :5], cache.empty(model.cfg, 2, 8))
    second, _ = extend(model, tokens[:, 5:], ones[:, 5:], past)
    assert relative_error(np.concatenate([first, second], axis=1), full(model, tokens)) < 1e-5


@pytest.mark.usefixtures("optimizations")
def test_the_compiled_loop_updates_the_cache_in_place(model):
    """Check that the temporaries of a compiled decode loop do not hold a second copy of the
    cache.
    """
    cfg = dataclasses.replace(model.cfg, num_hidden_layers=8)
    graphdef, state = nnx.split(Qwen3(cfg, rngs=nnx.Rngs(0)))

    def decode(state, token_B, past):
        def step(carry, _):
            token_B, past = carry
            hidden, past = (model := nnx.merge(graphdef, state)).extend(
                model.embed(token_B[:, None]), jnp.ones((2, 1), jnp.int32), past
            )
            return (jnp.argmax(model.logits(hidden[:, 0]), axis=-1), past), None

        return jax.lax.scan(step, (token_B, past), length=500)[0]

    past = cache.empty(cfg, 2, 2048)
    memory = (
        jax.jit(decode, donate_argnums=2)
        .lower(state, jnp.zeros(2, jnp.int32), past)
        .compile()
        .memory_analysis()
    )
    one_array = sum(k.nbytes for k in jax.tree.leaves(past.k_YBGSK))
    assert memory.temp_size_in_bytes < one_array, (memory.temp_size_in_bytes, one_array)
