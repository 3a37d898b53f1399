"""Check operations on rows of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import ConfigError
from blip3o_jax.rows import condition_positions, mask_prompts, slice_condition_span


def test_mask_prompts():
    segment_ids = jnp.asarray([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    got = mask_prompts(segment_ids, jnp.asarray([2, 3, 2]), jnp.asarray([True, True, False]))
    assert got.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]


def test_slice_condition_span():
    """Check "exact", the scale token and its image tokens, and "last", the row's tail of any
    tokens."""
    hidden_BLD = jnp.arange(2 * 8 * 2, dtype=jnp.float32).reshape(2, 8, 2)
    span_B = jnp.array([1, 3], jnp.int32)
    assert condition_positions(span_B, 2).tolist() == [[1, 2, 3], [3, 4, 5]]
    exact = slice_condition_span(hidden_BLD, span_B, 2, "exact")
    assert np.array_equal(exact, np.stack([hidden_BLD[0, 1:4], hidden_BLD[1, 3:6]]))
    last = slice_condition_span(hidden_BLD, span_B, 2, "last")
    assert np.array_equal(last, hidden_BLD[:, 5:8])
    with pytest.raises(ConfigError, match=r"loss\.condition_span"):
        slice_condition_span(hidden_BLD, span_B, 2, "first")


def test_slice_condition_span_sends_gradients_to_the_span_only():
    span_B = jnp.array([1, 3], jnp.int32)
    grad_BLD = jax.grad(lambda h: slice_condition_span(h, span_B, 2).sum())(jnp.zeros((2, 8, 2)))
    assert grad_BLD[..., 0].tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]
