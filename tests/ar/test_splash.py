"""The Pallas kernel, interpreted, against plain attention. Both compute in float32 with sums in
another order: 1e-5 of the norm, of gradients too; the exponential of the kernel is one of powers of
two.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import nn
from blip3o_jax.ar import attention
from blip3o_jax.ar.splash import splash
from blip3o_jax.config import ConfigError
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
    """Return a padded row, two packed examples, a row that opens with padding, a full row."""
    rng = np.random.default_rng(0)
    qkv = [rng.normal(size=(B, L, heads, K)).astype(np.float32) for heads in (H, G, G)]
    segments_BL = np.ones((B, L), np.int32)
    segments_BL[0, 150:] = 0
    segments_BL[1, 90:] = 2
    segments_BL[2, :30] = 0
    return *qkv, segments_BL


def whole(implementation):
    return lambda q, k, v, segments_BL: attention.attend(
        q,
        k,
        v,
        query_segments_BL=segments_BL,
        key_segments_BS=segments_BL,
        implementation=implementation,
    )


def value_and_gradients(attend, strategy=None):
    *qkv, segments_BL = inputs()

    def loss(q, k, v):
        with nn.sharding_resolver(strategy and strategy.resolver), nn.part("ar"):
            o_BLHK = attend(q, k, v, segments_BL)
        return jnp.sum(jnp.sin(o_BLHK + 1)), o_BLHK

    (_, o), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return o, *gradients


@functools.cache
def wanted():
    return value_and_gradients(whole("xla"))


@pytest.mark.parametrize("name", MESHES)
def test_splash_is_plain_attention(name, monkeypatch):
    monkeypatch.setitem(attention.PLATFORMS, "splash", ("tpu", "cpu"))
    mesh = MESHES[name]
    strategy = mesh and tiny.strategy(*mesh, sequence=2 if mesh[0] == "fsdp_sp" else 1)
    for what, got, want in zip(
        ("output", "q", "k", "v"),
        value_and_gradients(whole("splash"), strategy),
        wanted(),
        strict=True,
    ):
        assert relative_error(got, want) < 1e-5, what
    assert np.all(np.asarray(wanted()[0])[inputs()[-1] == 0] == 0)


@pytest.mark.parametrize("name", MESHES)
def test_splash_of_the_ends_of_rows(name, monkeypatch):
    """Compute the last queries of each row alone, as after a prompt whose prefill several rows
    share.
    """
    monkeypatch.setitem(attention.PLATFORMS, "splash", ("tpu", "cpu"))
    start, mesh = 72, MESHES[name]
    strategy = mesh and tiny.strategy(*mesh, sequence=2 if mesh[0] == "fsdp_sp" else 1)

    def ends(implementation):
        def attend(q, k, v, segments_BL):
            of = {
                "query_segments_BL": segments_BL[:, start:],
                "key_segments_BS": segments_BL,
                "query_start": start,
            }
            return attention.attend(q[:, start:], k, v, **of, implementation=implementation)

        return attend

    found = value_and_gradients(ends("splash"), strategy), value_and_gradients(ends("xla"))
    for what, got, want in zip(("output", "q", "k", "v"), *found, strict=True):
        assert relative_error(got, want) < 1e-5, what
    assert relative_error(found[0][0], wanted()[0][:, start:]) < 1e-5


def test_the_gpu_form_is_plain_attention():
    def gpu(q, k, v, segments_BL):
        o_BLHK = attention.dot_product(q, k, v, segments_BL, segments_BL, 0, implementation="xla")
        return jnp.where(segments_BL[:, :, None, None] != 0, o_BLHK, 0)

    for what, got, want in zip(
        ("output", "q", "k", "v"), value_and_gradients(gpu), wanted(), strict=True
    ):
        assert relative_error(got, want) < 1e-5, what


def test_a_cache_is_refused():
    *qkv, segments_BL = inputs()
    with pytest.raises(ValueError, match="splash attention is for whole rows"):
        splash(*qkv, segments_BL, segments_BL, jnp.int32(0))


@pytest.mark.parametrize(("name", "its"), [("cudnn", "GPU"), ("splash", "TPU")])
def test_a_kernel_of_another_platform_is_refused(name, its):
    *qkv, segments_BL = inputs()
    with pytest.raises(
        ConfigError,
        match=f"ar.attention='{name}' is a kernel of {its}s and this runs on a CPU: set 'auto'",
    ):
        attention.attend(
            *qkv, query_segments_BL=segments_BL, key_segments_BS=segments_BL, implementation=name
        )


def test_what_auto_stands_for(caplog):
    attention.default_implementation.cache_clear()
    cases = {
        ("tpu", "bfloat16", True): "splash",
        ("tpu", "bfloat16", False): "xla",
        ("gpu", "bfloat16", True): "cudnn",
        ("gpu", "float32", True): "xla",
        ("cpu", "float32", True): "xla",
    }
    with caplog.at_level("INFO"):
        for (platform, dtype, whole_rows), want in [*cases.items()] * 2:
            assert attention.default_implementation(platform, dtype, whole_rows=whole_rows) == want
    assert len(caplog.messages) == len(cases)
    assert caplog.messages[0] == "attention over whole rows in bfloat16 on tpu: splash"
