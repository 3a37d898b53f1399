"""The chunked cross entropy against the naive one. Tolerances: both are float32 sums over a few
hundred terms, in another order, hence 1e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from blip3o_jax.ar.cross_entropy import cross_entropy
from tests.conftest import relative_error

B, L, D, V, ROWS = 2, 11, 8, 21, 24  # ROWS: of the head, padding included


def naive(hidden_BLD, head_DV, labels_BL, mask_BL):
    log_p_BLV = jax.nn.log_softmax((hidden_BLD @ head_DV)[..., :V])
    right = jnp.sum((jnp.argmax(log_p_BLV, axis=-1) == labels_BL) * mask_BL)
    return -jnp.sum(
        jnp.take_along_axis(log_p_BLV, labels_BL[..., None], axis=-1)[..., 0] * mask_BL
    ), right


@pytest.fixture
def inputs(rng):
    hidden_BLD = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
    # The padded rows point along every hidden state: unless they are left out they win.
    head_DV = jnp.asarray(rng.normal(size=(D, ROWS)), jnp.float32).at[:, V:].set(30.0)
    best_BL = jnp.argmax((hidden_BLD @ head_DV)[..., :V], axis=-1)
    labels_BL = jnp.where(rng.random((B, L)) < 0.5, best_BL, rng.integers(0, V, (B, L)))
    return hidden_BLD, head_DV, labels_BL, jnp.asarray(rng.random((B, L)) < 0.7, jnp.float32)


@pytest.mark.parametrize(
    ("chunk", "max_labels"),
    [(1, None), (4, None), (11, None), (64, None), (64, 9), (4, 10), (4, 64)],
)
def test_equals_the_naive_form(inputs, chunk, max_labels):
    assert (
        int(inputs[3].sum(axis=1).max()) == 9
    )  # with max_labels = 9 one row is taken to its last label, the other is not

    def chunked(hidden_BLD, head_DV):
        return cross_entropy(
            hidden_BLD, head_DV, *inputs[2:], vocab_size=V, chunk=chunk, max_labels=max_labels
        )

    (want, want_right), wanted = jax.value_and_grad(naive, argnums=(0, 1), has_aux=True)(*inputs)
    (got, right), gots = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(
        *inputs[:2]
    )
    assert relative_error(got, want) < 1e-6
    assert 0 < float(right) == float(want_right) < float(inputs[3].sum())
    for name, gradient, want_gradient in zip(("hidden", "head"), gots, wanted, strict=True):
        assert relative_error(gradient, want_gradient) < 1e-6, name
    assert not np.any(gots[0][inputs[3] == 0]) and not np.any(gots[1][:, V:])


def test_by_hand():
    """Compare with logits log 1, log 2, log 5 (and a padded row): the losses are log of 8 / 1, 8 /
    2, 8 / 5; only the last is right.
    """
    head_DV = jnp.log(jnp.array([[1.0, 2.0, 5.0, 100.0]]))
    hidden_BLD = jnp.ones((1, 4, 1))
    labels_BL = jnp.array([[0, 1, 2, 2]])
    loss, right = cross_entropy(
        hidden_BLD, head_DV, labels_BL, jnp.array([[1, 1, 1, 0]]), vocab_size=3, chunk=3
    )
    assert float(loss) == pytest.approx(np.log(8 * 4 * 8 / 5), rel=1e-6)
    assert float(right) == 1.0


def test_bfloat16_factors_give_float32_losses(inputs):
    """Allow the rounding of the factors alone: a token's loss in bfloat16 would have steps of 2 %;
    with float32 logits only the rounding of the factors is left.
    """
    hidden_BLD, head_DV, labels_BL, mask_BL = inputs
    want, _ = naive(hidden_BLD, head_DV, labels_BL, mask_BL)
    got, _ = cross_entropy(
        hidden_BLD.astype(jnp.bfloat16), head_DV, labels_BL, mask_BL, vocab_size=V, chunk=4
    )
    assert got.dtype == jnp.float32
    assert 0 < relative_error(got, want) < 4e-3


def test_no_array_holds_all_logits(inputs):
    """Check that the largest intermediate is one block of B x chunk x V, in the backward pass
    too.
    """
    fn = jax.grad(
        lambda h, w: cross_entropy(h, w, *inputs[2:], vocab_size=V, chunk=4, max_labels=9)[0],
        argnums=(0, 1),
    )
    largest = max(_sizes(jax.make_jaxpr(fn)(*inputs[:2]).jaxpr))
    assert largest <= max(B * 4 * ROWS, B * 12 * D, D * ROWS) < B * L * ROWS


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for sub in core.jaxprs_in_params(eqn.params):
            yield from _sizes(sub)
