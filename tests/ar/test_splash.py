"""The Pallas kernel, interpreted, against plain attention. Both compute in float32 with sums in another order: 1e-5 of the
norm, of gradients too; the exponential of the kernel is one of powers of two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import nn
from blip3o_jax.ar import attention
from tests import tiny
from tests.conftest import relative_error

B, L, H, G, K = 4, 200, 4, 2, 8  # padded to 256
MESHES = {
    "no mesh": None,
    "heads": ("fsdp_tp", 1, 4, 2),
    "queries": ("fsdp_sp", 2, 2, 1),
}


@functools.cache
def inputs():
    """A padded row, two packed examples, a row that opens with padding, a full row."""
    rng = np.random.default_rng(0)
    qkv = [rng.normal(size=(B, L, heads, K)).astype(np.float32) for heads in (H, G, G)]
    segments_BL = np.ones((B, L), np.int32)
    segments_BL[0, 150:] = 0
    segments_BL[1, 90:] = 2
    segments_BL[2, :30] = 0
    return *qkv, segments_BL


def value_and_gradients(implementation, strategy=None):
    *qkv, segments_BL = inputs()

    def loss(q, k, v):
        with nn.sharding_resolver(strategy and strategy.resolver), nn.part("ar"):
            o_BLHK = attention.attend(
                q, k, v, query_segments_BL=segments_BL, key_segments_BS=segments_BL, implementation=implementation
            )
        return jnp.sum(jnp.sin(o_BLHK + 1)), o_BLHK

    (_, o), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return o, *gradients


@functools.cache
def wanted():
    return value_and_gradients("xla")


@pytest.mark.parametrize("name", MESHES)
def test_splash_is_plain_attention(name):
    mesh = MESHES[name]
    strategy = mesh and tiny.strategy(*mesh, sequence=2 if mesh[0] == "fsdp_sp" else 1)
    for what, got, want in zip(("output", "q", "k", "v"), value_and_gradients("splash", strategy), wanted(), strict=True):
        assert relative_error(got, want) < 1e-5, what
    assert np.all(np.asarray(wanted()[0])[inputs()[-1] == 0] == 0)


def test_the_gpu_form_is_plain_attention():
    for what, got, want in zip(("output", "q", "k", "v"), value_and_gradients("cudnn"), wanted(), strict=True):
        assert relative_error(got, want) < 1e-5, what


def test_a_cache_is_refused():
    *qkv, segments_BL = inputs()
    with pytest.raises(ValueError, match="splash attention is for whole rows"):
        attention.attend(
            *qkv,
            query_segments_BL=segments_BL,
            key_segments_BS=segments_BL,
            query_start=jnp.int32(0),
            implementation="splash",
        )


def test_what_auto_stands_for(caplog):
    attention.chosen.cache_clear()
    cases = {
        ("tpu", "bfloat16", True): "splash",
        ("tpu", "bfloat16", False): "xla",
        ("gpu", "bfloat16", True): "cudnn",
        ("gpu", "float32", True): "xla",
        ("cpu", "float32", True): "xla",
    }
    with caplog.at_level("INFO"):
        for (platform, dtype, whole_rows), want in [*cases.items()] * 2:
            assert attention.chosen(platform, dtype, whole_rows=whole_rows) == want
    assert len(caplog.messages) == len(cases)
    assert caplog.messages[0] == "attention over whole rows in bfloat16 on tpu: splash"
