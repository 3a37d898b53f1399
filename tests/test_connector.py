"""Compare the connector with a plain torch Sequential, float32, random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from blip3o_jax import config, nn
from blip3o_jax.connector import Connector
from blip3o_jax.train.state import plan_state
from tests import tiny
from tests.conftest import relative_error

CFG = config.ConnectorConfig(dtype="float32")
D_IN, D_OUT = 12, 20
NAMES = {
    "0.weight": ("linear1", "kernel"),
    "0.bias": ("linear1", "bias"),
    "2.weight": ("linear2", "kernel"),
    "2.bias": ("linear2", "bias"),
    "3.weight": ("norm", "scale"),
}


def to_jax(name, tensor):
    array = tensor.detach().numpy()
    return array.T if array.ndim == 2 else array


def test_output_and_gradients():
    torch.manual_seed(0)
    oracle = torch.nn.Sequential(
        torch.nn.Linear(D_IN, D_OUT),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Linear(D_OUT, D_OUT),
        torch.nn.RMSNorm(D_OUT, eps=CFG.rms_norm_eps),
    )
    torch.nn.init.normal_(oracle[3].weight, 1.0, 0.3)
    graphdef, state = nnx.split(Connector(CFG, D_IN, D_OUT, rngs=nnx.Rngs(0)))
    flat = dict(nnx.to_flat_state(state))
    assert set(flat) == set(NAMES.values())
    for name, parameter in oracle.named_parameters():
        flat[NAMES[name]].set_value(to_jax(name, parameter))
    x = torch.randn(2, 5, D_IN)
    x[1] = 0  # a dropped condition
    weight = torch.randn(2, 5, D_OUT)
    want = oracle(x)
    (want * weight).sum().backward()

    def loss(state):
        y = nnx.merge(graphdef, state)(jnp.asarray(x.numpy()))
        return jnp.sum(y * weight.numpy()), y

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(nnx.from_flat_state(flat))
    assert relative_error(got, want.detach()) < 1e-5
    grads = dict(nnx.to_flat_state(grads))
    for name, parameter in oracle.named_parameters():
        assert relative_error(grads[NAMES[name]][...], to_jax(name, parameter.grad)) < 1e-4, name


def test_norm_starts_at_the_caption_scale():
    connector = Connector(CFG, D_IN, D_OUT, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(connector.norm.scale[...], np.sqrt(5.5), rtol=1e-6)
    y = connector(jax.random.normal(jax.random.key(0), (3, 4, D_IN)))
    # The mean square of an RMS-normalised vector is 1, times the weight squared.
    np.testing.assert_allclose(jnp.mean(y**2, axis=-1), 5.5, rtol=1e-3)


def test_rows_that_are_not_kept_are_the_null_condition(rng):
    """Check the sampler's single null token, with positions as without; kept rows are those of
    hidden states plus sinusoids."""
    x_BLD = rng.normal(size=(2, 5, D_IN)).astype(np.float32)
    plain = Connector(CFG, D_IN, D_OUT, rngs=nnx.Rngs(0))
    placed = Connector(dataclasses.replace(CFG, positions=True), D_IN, D_OUT, rngs=nnx.Rngs(0))
    for connector in (plain, placed):  # biases start at zero, and so would the null condition
        for linear in (connector.linear1, connector.linear2):
            linear.bias.set_value(jnp.linspace(-1, 1, linear.bias.size))
    null = plain(jnp.zeros((1, 1, D_IN)))
    for connector, added in ((plain, 0), (placed, np.asarray(nn.sinusoids(5, D_IN)))):
        got = connector(jnp.asarray(x_BLD), jnp.asarray([True, False]))
        assert relative_error(got[0], plain(jnp.asarray(x_BLD + added))[0]) < 1e-6
        assert relative_error(got[1], jnp.broadcast_to(null[0], got[1].shape)) < 1e-6
    assert relative_error(placed(jnp.asarray(x_BLD)), plain(jnp.asarray(x_BLD))) > 1e-2


def test_the_channels_of_latents_are_not_sharded():
    """Use 4 channels: fewer than the devices that share the weights, as the published 32 on a large
    machine."""
    cfg = tiny.run_config(model={"editing": config.EditingConfig(latents=True, features=True)})
    plan = plan_state(cfg, tiny.strategy("fsdp", 1, 8))
    parts = plan.abstract["params"] | plan.abstract["frozen"]
    kernels = {
        name: parts[f"{name}_connector"]["linear1"]["kernel"] for name in ("latent", "feature")
    }
    assert (
        kernels["latent"].shape == (4, 16)
        and kernels["latent"].sharding.shard_shape((4, 16))[0] == 4
    )
    assert not kernels["feature"].sharding.is_fully_replicated
