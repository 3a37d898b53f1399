"""The SigLIP encoder against `transformers.SiglipVisionModel`, float32, random weights.

A batch of B images; the image side is no multiple of the patch, heads and layers differ in number.
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
from blip3o_jax.image_tokens.siglip2 import SiglipVision
from tests import stock_weights
from tests.conftest import relative_error
from tests.image_tokens import torch_weights

CFG = config.SiglipVisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=23,
    patch_size=4,
    dtype="float32",
)
# float32 rounding through three layers is about 1e-6; a wrong GELU, eps or transposition shows
# above 1e-4.
OUTPUT, GRADIENT = 1e-5, 1e-4


def stock(cfg):
    names = {f.name for f in dataclasses.fields(cfg)} - {"dtype", "param_dtype", "remat", "unroll"}
    return transformers.SiglipVisionConfig(
        **{name: getattr(cfg, name) for name in names}, hidden_act="gelu_pytorch_tanh"
    )


@pytest.fixture(scope="module")
def pair():
    oracle = torch_weights.randomise(transformers.SiglipVisionModel(stock(CFG)))
    model = stock_weights.jax_model(oracle, CFG)
    x_BHWC = (
        np.random.default_rng(1)
        .uniform(-1, 1, (2, CFG.image_size, CFG.image_size, 3))
        .astype(np.float32)
    )
    return oracle, model, x_BHWC


def to_torch(x_BHWC):
    return torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)


def test_outputs(pair):
    oracle, model, x_BHWC = pair
    with torch.no_grad():
        want = oracle(to_torch(x_BHWC))
    got = jax.jit(lambda x: model(x))(x_BHWC)
    assert got.last_hidden_state_BND.shape == (2, 25, 24)
    assert relative_error(got.last_hidden_state_BND, want.last_hidden_state) < OUTPUT
    assert relative_error(got.pooled_BD, want.pooler_output) < OUTPUT


@pytest.mark.parametrize("select_layer", [-1, -2, -4])
def test_hidden_states(pair, select_layer):
    oracle, model, x_BHWC = pair
    with torch.no_grad():
        want = oracle(to_torch(x_BHWC), output_hidden_states=True).hidden_states[select_layer]
    got = jax.jit(lambda x: model.features(x, select_layer))(x_BHWC)
    assert relative_error(got, want) < OUTPUT


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients(pair, remat):
    """Compare those of one scalar over both outputs, for every parameter; the same with the layers
    computed twice.
    """
    oracle, model, x_BHWC = pair
    rng = np.random.default_rng(2)
    last, pooled = (
        rng.normal(size=(2, 25, 24)).astype(np.float32),
        rng.normal(size=(2, 24)).astype(np.float32),
    )
    oracle.zero_grad()
    out = oracle(to_torch(x_BHWC))
    (
        (out.last_hidden_state * torch.from_numpy(last)).sum()
        + (out.pooler_output * torch.from_numpy(pooled)).sum()
    ).backward()
    want = stock_weights.convert(stock_weights.gradients(oracle), CFG)

    graphdef, _ = nnx.split(
        nnx.eval_shape(
            lambda: SiglipVision(dataclasses.replace(CFG, remat=remat), rngs=nnx.Rngs(1))
        )
    )

    def loss(state):
        out = nnx.merge(graphdef, state)(x_BHWC)
        return jnp.sum(out.last_hidden_state_BND * last) + jnp.sum(out.pooled_BD * pooled)

    got = stock_weights.flat(jax.jit(jax.grad(loss))(nnx.state(model)))
    for path, gradient in want.items():
        if path.endswith(
            "key/bias"
        ):  # softmax does not see it: the gradient is zero but for rounding
            assert np.abs(got[path]).max() < 1e-4 and np.abs(gradient).max() < 1e-4
        else:
            assert relative_error(got[path], gradient) < GRADIENT, path


def test_gradient_stops_at_the_selected_layer(pair):
    """Check that layers past `select_layer` take no part, the others do, and their gradient is that
    of the stock class.
    """
    oracle, model, x_BHWC = pair
    oracle.zero_grad()
    oracle(to_torch(x_BHWC), output_hidden_states=True).hidden_states[-2].square().sum().backward()
    want = stock_weights.convert(stock_weights.gradients(oracle), CFG)
    graphdef, state = nnx.split(model)
    grads = jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s).features(x_BHWC, -2) ** 2)))(
        state
    )
    kernel = "encoder/layers/mlp/down/kernel"
    got = stock_weights.flat(grads)[kernel]
    assert not np.any(got[2]) and np.any(got[1])
    assert relative_error(got, want[kernel]) < GRADIENT


def test_wrong_size_and_layer(pair):
    _, model, x_BHWC = pair
    with pytest.raises(ValueError, match=r"expected \(23, 23, 3\)"):
        model.features(x_BHWC[:, :20])
    with pytest.raises(ValueError, match="select_layer=-5"):
        model.features(x_BHWC, -5)


def test_full_size_parameter_count():
    cfg = config.SiglipVisionConfig()
    with torch.device("meta"):
        want = sum(p.numel() for p in transformers.SiglipVisionModel(stock(cfg)).parameters())
    state = nnx.eval_shape(lambda: nnx.state(SiglipVision(cfg, rngs=nnx.Rngs(0))))
    assert sum(x.size for x in stock_weights.flat(state).values()) == want
