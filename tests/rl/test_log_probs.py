"""Compare scoring in one pass with the log-probabilities of sampling, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip3o_jax.ar import sampling
from blip3o_jax.ar.qwen3 import Qwen3
from blip3o_jax.config import SamplingConfig
from blip3o_jax.rl.log_probs import score_image_tokens
from tests.ar.test_sampling import CFG, IMAGE_IDS, LENGTHS, N, keys, prompts
from tests.conftest import relative_error

SETTINGS = {
    "full": SamplingConfig(temperature=1.0, top_k=0, top_p=1.0),
    "truncated": SamplingConfig(temperature=1.3, top_k=12, top_p=0.8),
    "guided": SamplingConfig(temperature=0.7, top_k=0, top_p=0.9, token_guidance=2.0),
}


@pytest.fixture(scope="module")
def model() -> Qwen3:
    return Qwen3(CFG, rngs=nnx.Rngs(0))


@functools.partial(nnx.jit, static_argnames=("settings",))
def drawn(model, tokens_BL, lengths_B, keys_B, settings):
    names = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
    return sampling.generate_image_tokens(
        model,
        tokens_BL,
        lengths_B,
        keys_B,
        num_tokens=N,
        image_ids=IMAGE_IDS,
        guidance=settings.token_guidance,
        return_support=True,
        **names,
    )


@functools.partial(nnx.jit, static_argnames=("settings", "chunk"))
def score(model, tokens_BL, lengths_B, ids_BN, support_BNX, settings, chunk):
    return score_image_tokens(
        model, tokens_BL, lengths_B, ids_BN, support_BNX, settings, image_ids=IMAGE_IDS, chunk=chunk
    )


@pytest.mark.parametrize("chunk", [N, 5, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_scoring_is_what_sampling_said(model, name, chunk):
    """Compare log-probabilities of up to 4 nats, whose float32 has steps of 4.8e-7, from logits of
    twice that; guidance of 2 at temperature 0.7 makes four times as much of an error."""
    settings, (tokens, lengths) = SETTINGS[name], prompts()
    found = drawn(model, tokens, lengths, keys(), settings)
    logprobs, entropy = score(
        model, tokens, lengths, found.ids_BN, found.support_BNX, settings, chunk
    )
    np.testing.assert_allclose(logprobs, found.logprobs_BN, atol=2e-5 if name == "guided" else 5e-6)
    assert logprobs.shape == entropy.shape == (len(LENGTHS), N)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_prompt_that_is_read_once_for_its_images_is_the_same(model, name):
    """Compare log-probabilities and their gradients: sums of float32 in another order."""
    settings, (tokens, lengths) = SETTINGS[name], (jnp.repeat(x, 2, axis=0) for x in prompts())
    found = drawn(
        model, tokens, lengths, jax.random.split(jax.random.key(3), len(tokens)), settings
    )
    assert (found.ids_BN[0] != found.ids_BN[1]).any()

    @nnx.jit(static_argnames=("group",))
    def scored(model, group):
        def total(model):
            given = tokens, lengths, found.ids_BN, found.support_BNX, settings
            logprobs_BN, _ = score_image_tokens(
                model, *given, image_ids=IMAGE_IDS, chunk=N, group=group
            )
            return jnp.sum(logprobs_BN * jnp.cos(jnp.arange(N))), logprobs_BN

        return nnx.value_and_grad(total, has_aux=True)(model)

    (_, want), want_grads = scored(model, 1)
    (_, got), got_grads = scored(model, 2)
    np.testing.assert_allclose(got, want, atol=2e-5 if name == "guided" else 5e-6)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        assert relative_error(a, b) < 1e-5


def test_entropy_by_its_definition(model):
    """Check the first token: over all image ids, and over two that are kept."""
    tokens, lengths = prompts()
    found = drawn(model, tokens, lengths, keys(), SETTINGS["full"])
    logits = np.asarray(model.logits(found.hidden_BTD[:, 0], IMAGE_IDS), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    _, entropy = score(model, tokens, lengths, found.ids_BN, None, SETTINGS["full"], N)
    np.testing.assert_allclose(entropy[:, 0], -(p * np.log(p)).sum(axis=1), rtol=1e-5)
    kept = np.zeros((len(LENGTHS), N, IMAGE_IDS[1] - IMAGE_IDS[0]), np.uint8)
    kept[..., :2] = 1
    _, entropy = score(
        model, tokens, lengths, found.ids_BN, np.packbits(kept, axis=-1), SETTINGS["full"], N
    )
    p = p[:, :2] / p[:, :2].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(entropy[:, 0], -(p * np.log(p)).sum(axis=1), rtol=1e-4)


@pytest.mark.parametrize("chunk", [5, N])
def test_gradients_are_those_of_one_block(model, chunk):
    """Check that gradients are finite where classes are left out and the last block is not full."""
    settings, (tokens, lengths) = SETTINGS["truncated"], prompts()
    found = drawn(model, tokens, lengths, keys(), settings)
    graphdef, state = nnx.split(model)

    def loss(state, chunk):
        logprobs, _ = score_image_tokens(
            nnx.merge(graphdef, state),
            tokens,
            lengths,
            found.ids_BN,
            found.support_BNX,
            settings,
            image_ids=IMAGE_IDS,
            chunk=chunk,
        )
        return jnp.sum(logprobs * jnp.arange(N))

    got, want = (
        jax.tree.leaves(jax.jit(jax.grad(loss), static_argnums=1)(state, c)) for c in (chunk, N)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
        assert np.isfinite(a).all()


def test_a_class_that_was_left_out_stays_left_out(model):
    """Check that under another policy the probabilities of the kept classes sum to one: scoring
    uses a distribution over them."""
    settings, (tokens, lengths) = SETTINGS["truncated"], prompts()
    found = drawn(model, tokens, lengths, keys(), settings)
    other = Qwen3(dataclasses.replace(CFG), rngs=nnx.Rngs(1))
    total = 0.0
    for choice in range(*IMAGE_IDS):
        ids = np.asarray(found.ids_BN).copy()
        ids[:, -1] = choice
        logprobs, _ = score(other, tokens, lengths, ids, found.support_BNX, settings, N)
        total += np.exp(np.asarray(logprobs[:, -1], np.float64))
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
