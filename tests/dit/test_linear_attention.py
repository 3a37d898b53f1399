import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.dit.linear_attention import relu_linear_attention
from tests.conftest import relative_error


def test_equals_the_quadratic_form(rng):
    q, k, v = rng.normal(size=(3, 2, 11, 3, 4))
    scores = np.einsum("bnhk,bmhk->bhnm", np.maximum(q, 0), np.maximum(k, 0))
    want = np.einsum("bhnm,bmhk->bnhk", scores / (scores.sum(-1, keepdims=True) + 1e-15), v)
    got = jax.jit(relu_linear_attention)(*(a.astype(np.float32) for a in (q, k, v)))
    assert relative_error(got, want) < 1e-6


def test_a_row_that_attends_to_nothing_is_zero_and_has_finite_gradients(rng):
    q, k, v = rng.normal(size=(3, 1, 5, 1, 4)).astype(np.float32)
    q[0, 2] = -1
    assert not np.asarray(relu_linear_attention(q, k, v))[0, 2].any()
    gradients = jax.grad(lambda *a: relu_linear_attention(*a).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)


def test_sums_over_many_tokens_are_exact_in_bfloat16(rng):
    """Set all keys and queries to 1: the output is the mean of the values. A sum in bfloat16 stands
    still at 256.
    """
    ones = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    v = jnp.asarray(rng.uniform(1, 2, size=ones.shape), jnp.bfloat16)
    got = relu_linear_attention(ones, ones, v)
    assert got.dtype == jnp.bfloat16
    want = np.broadcast_to(np.asarray(v, np.float64).mean(1, keepdims=True), v.shape)
    assert relative_error(got.astype(jnp.float32), want) < 2**-8
