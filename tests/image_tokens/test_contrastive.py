"""SigLIP's loss against hand-computed values, and what the caption tower must and must not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip3o_jax import config
from blip3o_jax.image_tokens.contrastive import (
    PatchReadout,
    TextTower,
    same_caption_mask,
    sigmoid_loss,
)

CFG = config.TextTowerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    dtype="float32",
)


def softplus(x):
    return np.log1p(np.exp(x))


# Cosines of image i with caption j: [[0.6, 0.8], [1, 0]]; the lengths must not matter.
IMAGE = jnp.array([[0.0, 5.0], [2.0, 0.0]])
TEXT = jnp.array([[0.8, 0.6], [0.0, 3.0]])


def test_loss_by_hand():
    """Scale 2, bias -1: logits [[0.2, 1], [0.6, -1]]; -log sigmoid(x) = softplus(-x)."""
    loss, metrics = sigmoid_loss(IMAGE, TEXT, jnp.log(2.0), jnp.array(-1.0))
    want = (softplus(-0.2) + softplus(1.0) + softplus(0.6) + softplus(1.0)) / 2
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert metrics["image_to_text"] == 0 and metrics["text_to_image"] == 0
    assert metrics["logit_bias"] == -1
    np.testing.assert_allclose(metrics["logit_scale"], 2, rtol=1e-6)


def test_repeated_captions_are_no_negatives():
    """Mark two captions as equal: only the diagonal is left, and either caption is the right
    one.
    """
    loss, metrics = sigmoid_loss(IMAGE, TEXT, jnp.log(2.0), jnp.array(-1.0), jnp.ones((2, 2), bool))
    np.testing.assert_allclose(loss, (softplus(-0.2) + softplus(1.0)) / 2, rtol=1e-6)
    assert metrics["image_to_text"] == 1 and metrics["text_to_image"] == 1
    unmarked, _ = sigmoid_loss(IMAGE, TEXT, jnp.log(2.0), jnp.array(-1.0), jnp.zeros((2, 2), bool))
    np.testing.assert_allclose(
        unmarked, sigmoid_loss(IMAGE, TEXT, jnp.log(2.0), jnp.array(-1.0))[0]
    )


def test_same_caption_mask():
    tokens = jnp.array([[4, 5, 0], [4, 5, 6], [4, 5, 0]])
    np.testing.assert_array_equal(same_caption_mask(tokens), [[1, 0, 1], [0, 1, 0], [1, 0, 1]])


def test_zero_embedding_has_finite_gradient():
    grads = jax.grad(lambda x: sigmoid_loss(x, TEXT, jnp.log(10.0), jnp.array(-10.0))[0])(
        jnp.zeros((2, 2))
    )
    assert np.all(np.isfinite(grads))


def test_patch_readout_is_relative_to_the_variance(rng):
    encoder = config.SiglipVisionConfig(hidden_size=6, num_attention_heads=2, patch_size=2)
    cfg = config.TaTokConfig(encoder=encoder, dtype="float32")
    readout = PatchReadout(cfg, rngs=nnx.Rngs(0))
    patches = jnp.asarray(rng.normal(2.0, 3.0, size=(4, 9, 12)), jnp.float32)
    features = jnp.zeros((4, 9, 6))  # leaves the bias alone
    readout.linear.bias[...] = jnp.full(12, patches.mean())
    np.testing.assert_allclose(readout.loss(features, patches), 1, rtol=1e-5)
    readout.linear.bias[...] = jnp.full(12, patches.mean() + patches.std())
    np.testing.assert_allclose(readout.loss(features, patches), 2, rtol=1e-5)


@pytest.fixture(scope="module")
def tower():
    return TextTower(CFG, vocab_size=11, d_image=20, rngs=nnx.Rngs(0))


def test_padding_is_not_seen_and_order_is(tower):
    embed = jax.jit(lambda tokens, mask: tower(tokens, mask))
    mask = jnp.array([[1, 1, 1, 0, 0]] * 3, bool)
    tokens = jnp.array([[3, 4, 5, 0, 0], [3, 4, 5, 9, 2], [5, 4, 3, 0, 0]])
    out = embed(tokens, mask)
    assert out.shape == (3, 20) and out.dtype == jnp.float32
    np.testing.assert_allclose(out[0], out[1], rtol=1e-6, atol=1e-6)
    assert np.abs(out[0] - out[2]).max() > 1e-2
    np.testing.assert_allclose(embed(tokens[:1, :3], mask[:1, :3])[0], out[0], rtol=1e-5, atol=1e-5)


def test_attends_both_ways(tower):
    """Check that the first token's embedding changes the last position's output and the reverse: no
    causal mask.
    """
    tokens, mask = jnp.array([[3, 4, 5]]), jnp.ones((1, 3), bool)
    jacobian = jax.jacobian(lambda x: tower.encoder(x, mask))(tower.token_embedding[...][tokens])
    reach = np.abs(jacobian).sum((0, 2, 3, 5))
    assert np.all(reach > 1e-4)


def test_starts_as_published(tower):
    np.testing.assert_allclose(
        [jnp.exp(tower.log_scale[...]), tower.bias[...]], [10, -10], rtol=1e-6
    )
