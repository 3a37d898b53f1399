"""TA-Tok against transformers' SigLIP classes around a plain torch bottleneck
(convert/torch_parts.py), float32, random weights.

The grid is 7 x 7 (pool scales 2 and 3 drop a row and a column), the decoder's position table 4 x 4:
pool scale 1 enlarges it, 2 and 3 shrink it. Encoder, code and decoder widths all differ.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip3o_jax import config
from blip3o_jax.convert import torch_parts
from blip3o_jax.image_tokens import simvq
from blip3o_jax.image_tokens.ta_tok import TaTok, pool
from tests import stock_weights
from tests.conftest import relative_error
from tests.image_tokens import torch_weights

CFG = config.TaTokConfig(
    encoder=config.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=30,
        patch_size=4,
        dtype="float32",
    ),
    decoder=config.TaTokDecoderConfig(
        hidden_size=36,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_patches=16,
    ),
    bottleneck_dim=16,
    codebook_size=50,
    dtype="float32",
)
GRID = CFG.encoder.grid


def build(l2_normalized):
    # Squared distances are of order 2 x 16 where cosines are at most 1.
    cfg = dataclasses.replace(
        CFG, l2_normalized=l2_normalized, stochastic_temperature=0.03 if l2_normalized else 3.0
    )
    oracle = torch_weights.randomise(torch_parts.TaTok(cfg))
    return oracle, stock_weights.jax_model(oracle, cfg)


PAIRS = {True: None, False: None}


@pytest.fixture(params=[True, False], ids=["l2", "plain"])
def pair(request):
    if PAIRS[request.param] is None:
        PAIRS[request.param] = build(request.param)
    return PAIRS[request.param]


@pytest.fixture
def x_BHWC(rng):
    size = CFG.encoder.image_size
    return rng.uniform(-1, 1, (3, size, size, 3)).astype(np.float32)


def to_torch(x_BHWC):
    return torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_encode_and_decode(pair, x_BHWC, scale):
    oracle, model = pair
    with torch.no_grad():
        teacher = oracle.features(to_torch(x_BHWC), scale)
        want = oracle.quantise(teacher)
        features = oracle.reconstruct(want.codes_BND)
    ids_BN = jax.jit(lambda x: model.encode(x, scale))(x_BHWC)
    assert ids_BN.dtype == jnp.int32 and ids_BN.shape == (3, (GRID // scale) ** 2) == (
        3,
        model.num_tokens(scale),
    )
    np.testing.assert_array_equal(ids_BN, want.ids_BN)
    assert scale > 1 or len(np.unique(ids_BN)) > 10, "the comparison needs more than a few codes"
    assert relative_error(model.features(x_BHWC, scale), teacher) < 1e-5
    assert relative_error(jax.jit(model.decode)(ids_BN), features) < 1e-5


def test_training_terms_and_gradients(pair, x_BHWC):
    oracle, model = pair
    oracle.zero_grad()
    teacher = oracle.features(to_torch(x_BHWC), 2)
    q = oracle.quantise(teacher)
    rec = oracle.reconstruct(q.codes_BND)
    reconstruction = (rec - teacher).square().mean()
    weights = {"codebook_loss": 1.0, "commitment_loss": 0.25, "entropy_gap": 0.1}
    (reconstruction + sum(weight * getattr(q, name) for name, weight in weights.items())).backward()
    want = stock_weights.convert(stock_weights.gradients(oracle), oracle.cfg)
    graphdef, state = nnx.split(model)

    def loss(state):
        out = nnx.merge(graphdef, state)(x_BHWC, 2)
        reconstruction = jnp.mean((out.reconstructed_BND - out.teacher_BND) ** 2)
        return reconstruction + sum(
            weight * getattr(out, name) for name, weight in weights.items()
        ), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(state)
    assert relative_error(out.reconstructed_BND, rec.detach()) < 1e-5
    for name in weights:
        np.testing.assert_allclose(
            getattr(out, name), getattr(q, name).item(), rtol=2e-5, err_msg=name
        )
    drawn = (
        np.bincount(np.asarray(out.ids_BN).ravel(), minlength=CFG.codebook_size) / out.ids_BN.size
    )
    np.testing.assert_allclose(out.usage, np.mean(drawn > 0), rtol=1e-6)
    np.testing.assert_allclose(
        out.perplexity, np.exp(-sum(p * np.log(p) for p in drawn if p)), rtol=1e-5
    )

    got = stock_weights.flat(grads)
    for path, gradient in want.items():
        if path.startswith("encoder/") or "/head/" in path:
            assert not np.any(got[path]), f"{path} must get no gradient"
        elif path.endswith(
            "attention/key/bias"
        ):  # softmax does not see it: the gradient is zero but for rounding
            assert np.abs(got[path]).max() < 1e-5 and np.abs(gradient).max() < 1e-5
        else:
            assert relative_error(got[path], gradient) < 1e-4, path


def test_lookup_in_chunks(pair, monkeypatch):
    """Look up few tokens at a time, as a large codebook is searched: indices, terms and
    gradients stay.
    """
    _, model = pair
    graphdef, state = nnx.split(model.bottleneck.codebook)
    z_BND = np.random.default_rng(0).normal(size=(3, 49, CFG.bottleneck_dim))

    def loss(state):
        out = nnx.merge(graphdef, state)(z_BND)
        return out.entropy_gap + out.codebook_loss, out

    grads, whole = jax.jit(jax.grad(loss, has_aux=True))(state)
    monkeypatch.setattr(simvq, "MAX_SCORES", 8 * CFG.codebook_size)  # 49 tokens: 7 chunks of 7
    chunked_grads, chunked = jax.jit(jax.grad(lambda s: loss(s), has_aux=True))(state)
    np.testing.assert_array_equal(chunked.ids_BN, whole.ids_BN)
    np.testing.assert_allclose(chunked.entropy_gap, whole.entropy_gap, atol=2e-6)
    assert relative_error(chunked_grads["embedding"][...], grads["embedding"][...]) < 1e-5
    lowered = jax.jit(jax.grad(lambda s: loss(s)[0])).lower(state).as_text()
    assert "3x7x50" in lowered and "3x49x50" not in lowered, (
        "the scores of all tokens stand in memory at once"
    )


def test_stochastic_mode_draws_from_the_softmax():
    """Compare the frequencies of 2 x 4000 draws of one vector against p = softmax(s /
    temperature).
    """
    codebook = simvq.SimVq(
        6,
        4,
        l2_normalized=True,
        stochastic=True,
        temperature=0.5,
        param_dtype="float32",
        rngs=nnx.Rngs(params=3),
    )
    z_D = np.array([0.3, -1.0, 0.5, 0.2], np.float32)
    z_BND = jnp.broadcast_to(z_D, (2, 4000, 4))
    ids = np.asarray(codebook.indices(z_BND, jax.random.key(0)))
    scores = np.asarray(codebook.table()) @ (z_D / np.linalg.norm(z_D))
    p = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
    # Standard error of a frequency: at most sqrt(.25 / 8000) = 0.006.
    np.testing.assert_allclose(np.bincount(ids.ravel(), minlength=6) / ids.size, p, atol=0.025)
    assert not np.array_equal(ids, codebook.indices(z_BND, jax.random.key(1)))
    assert np.all(np.asarray(codebook.indices(z_BND)) == scores.argmax()), (
        "without a key the best code is taken"
    )
    with pytest.raises(ValueError, match="pass key="):
        codebook(z_BND)


def test_entropy_term_revives_dead_codes():
    """Put the inputs on one side of the sphere and most codes on the other: descending the entropy
    term alone uses them.
    """
    codebook = simvq.SimVq(
        32,
        8,
        l2_normalized=True,
        stochastic=False,
        temperature=0.1,
        param_dtype="float32",
        rngs=nnx.Rngs(params=0),
    )
    z_BND = 1 + 0.3 * jax.random.normal(jax.random.key(1), (4, 64, 8))
    graphdef, state = nnx.split(codebook)

    def loss(state):
        out = nnx.merge(graphdef, state)(z_BND)
        return out.entropy_gap, out.usage

    def step(state, _):
        grads, usage = jax.grad(loss, has_aux=True)(state)
        return jax.tree.map(lambda p, g: p - 0.3 * g, state, grads), usage

    _, usage = jax.lax.scan(step, state, length=100)
    assert usage[0] < 0.2 and usage[-1] > 0.85, (usage[0], usage[-1])


def test_pool_drops_the_remainder():
    x_BND = jnp.arange(25.0).reshape(1, 25, 1)
    np.testing.assert_allclose(pool(x_BND, 2)[0, :, 0], [3, 5, 13, 15])
    np.testing.assert_allclose(pool(x_BND, 3)[0, :, 0], [6])


def test_user_errors(pair, x_BHWC):
    _, model = pair
    with pytest.raises(ValueError, match="pool_scale=4 must be 1, 2 or 3"):
        model.encode(x_BHWC, 4)
    with pytest.raises(ValueError, match="8 image tokens are not a square grid"):
        model.decode(jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(config.ConfigError, match="num_patches=15 must be a square"):
        dataclasses.replace(CFG.decoder, num_patches=15)
    with pytest.raises(
        config.ConfigError, match=r"hidden_size=36 must be a multiple of .*num_attention_heads=5"
    ):
        dataclasses.replace(CFG.decoder, num_attention_heads=5)


def test_full_size_parameter_counts():
    cfg = config.TaTokConfig()
    state = nnx.eval_shape(lambda: nnx.state(TaTok(cfg, rngs=nnx.Rngs(0))))
    with torch.device("meta"):
        decoder = transformers.Siglip2VisionModel(torch_parts.ta_tok_decoder_config(cfg))
    assert sum(x.size for x in stock_weights.flat(state["decoder"]).values()) == sum(
        p.numel() for p in decoder.parameters()
    )
    assert (cfg.grid, state["bottleneck"]["codebook"]["embedding"].shape) == (27, (65536, 1536))
