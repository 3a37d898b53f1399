import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.ar import attention
from tests.conftest import relative_error

# B=2, L=5, H=6, G=2, K=4
SEGMENTS = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 1]])


@pytest.fixture
def qkv(rng):
    return tuple(rng.normal(size=(2, 5, heads, 4)).astype(np.float32) for heads in (6, 2, 2))


def test_attend_equals_a_loop_over_every_query_and_head(qkv):
    q, k, v = (x.astype(np.float64) for x in qkv)
    want = np.zeros_like(q)
    for b, t, h in np.ndindex(2, 5, 6):
        seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t] != 0]
        if seen:
            scores = np.exp(k[b, seen, h // 3] @ q[b, t, h] / 2)
            want[b, t, h] = scores / scores.sum() @ v[b, seen, h // 3]
    got = attention.attend(*qkv, query_segments_BL=SEGMENTS, key_segments_BS=SEGMENTS)
    assert relative_error(got, want) < 1e-6  # float32 rounding of short sums
    assert np.all(np.asarray(got)[SEGMENTS == 0] == 0)


def test_queries_from_a_later_slot_see_the_slots_before_them(qkv):
    q, k, v = qkv
    whole = attention.attend(q, k, v, query_segments_BL=SEGMENTS, key_segments_BS=SEGMENTS)
    tail = attention.attend(
        q[:, 3:],
        k,
        v,
        query_segments_BL=SEGMENTS[:, 3:],
        key_segments_BS=SEGMENTS,
        query_start=jnp.int32(3),
    )
    assert relative_error(tail, whole[:, 3:]) < 1e-6


def test_gradient_is_finite_and_padding_takes_no_part(qkv):
    def loss(q, k, v):
        o = attention.attend(q, k, v, query_segments_BL=SEGMENTS, key_segments_BS=SEGMENTS)
        return jnp.sum(jnp.sin(o + 1))

    for gradient in jax.grad(loss, (0, 1, 2))(*qkv):
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[SEGMENTS == 0] == 0)


def test_rotation_depends_on_distance_only(rng):
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(query_position, key_position):
        rotated = [
            attention.apply_rotary_embedding(
                x, attention.rotary_embedding(np.array([[p]]), 8, 100.0)
            )
            for x, p in ((q, query_position), (k, key_position))
        ]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert product(9, 4) == pytest.approx(product(25, 20), rel=1e-4)
    assert abs(product(9, 4) - product(9, 6)) > 0.1


def test_unknown_implementation_is_named(qkv):
    with pytest.raises(ValueError, match="'flash' is not one of xla"):
        attention.attend(
            *qkv, query_segments_BL=SEGMENTS, key_segments_BS=SEGMENTS, implementation="flash"
        )
