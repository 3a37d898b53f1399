"""Hold a scan over stacked layers to the loop over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip3o_jax import nn
from tests.conftest import relative_error

LAYERS, D = 3, 8


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nn.Linear(D, D, ("embed", "mlp"), rngs=rngs)
        self.norm = nn.RMSNorm(D, rngs=rngs, eps=1e-6, bias=True)

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        return x_BD + jnp.tanh(self.linear(self.norm(x_BD)))


def step(layer, x_BD, shift):
    y_BD = layer(x_BD) + shift
    return y_BD, y_BD.sum()


@pytest.fixture(scope="module")
def layers():
    return nn.stack(Layer, LAYERS, nnx.Rngs(0))


@pytest.fixture
def inputs(rng):
    return jnp.asarray(rng.normal(size=(2, D)), jnp.float32), jnp.arange(LAYERS, dtype=jnp.float32)


def unstacked(layers, i):
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[i], state))


@pytest.mark.parametrize("unroll", [False, True])
def test_scan_is_the_loop_over_the_layers(layers, inputs, unroll):
    x_BD, shifts = inputs
    got, sums = nn.scan(layers, step, x_BD, shifts, remat="none", unroll=unroll)
    want_sums = []
    for i in range(LAYERS):
        x_BD, total = step(unstacked(layers, i), x_BD, shifts[i])
        want_sums.append(total)
    assert relative_error(got, x_BD) < 1e-6
    assert relative_error(sums, jnp.stack(want_sums)) < 1e-6


def test_stacked_layers_differ_and_lead_with_the_layers_axis(layers):
    state = dict(nnx.to_flat_state(nnx.state(layers)))
    assert {path: (v.axes, v.shape) for path, v in state.items()} == {
        ("linear", "kernel"): (("layers", "embed", "mlp"), (LAYERS, D, D)),
        ("linear", "bias"): (("layers", "mlp"), (LAYERS, D)),
        ("norm", "scale"): (("layers", "norm"), (LAYERS, D)),
        ("norm", "bias"): (("layers", "norm"), (LAYERS, D)),
    }
    kernel = state["linear", "kernel"][...]
    assert not np.allclose(kernel[0], kernel[1])
    assert 0.8 < float(jnp.std(kernel)) * D**0.5 < 1.2  # fan-in of one layer, not of the stack


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_and_unroll_change_no_gradient_and_remat_keeps_less(layers, inputs, remat, unroll):
    """Allow 1e-6: the same float32 operations, which XLA may fuse otherwise, hence 1e-6."""
    graphdef, state = nnx.split(layers)

    def loss(state, remat, unroll):
        return jnp.sum(
            nn.scan(nnx.merge(graphdef, state), step, *inputs, remat=remat, unroll=unroll)[0] ** 2
        )

    def kept(remat):
        pull = jax.eval_shape(lambda s: jax.vjp(lambda s: loss(s, remat, unroll), s)[1], state)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    gradients = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    want, got = gradients(state, "none", False), gradients(state, remat, unroll)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-6, path
    assert kept(remat) < kept("none")


def test_every_remat_name_of_the_configuration_has_a_policy():
    from blip3o_jax import config

    assert set(nn.REMAT_POLICIES) == set(config.REMAT)


def test_the_program_does_not_grow_with_depth(inputs):
    def lines(count, unroll):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: nn.stack(Layer, count, nnx.Rngs(0))))

        def fn(state, x):
            run = lambda layer, x, _: (layer(x), None)
            return nn.scan(nnx.merge(graphdef, state), run, x, remat="none", unroll=unroll)[0]

        return len(jax.jit(fn).lower(state, inputs[0]).as_text().splitlines())

    assert lines(2, False) == lines(5, False) and lines(2, True) < lines(5, True)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_recorded_layers_are_those_of_the_scan(layers, inputs, remat):
    """Capture two stacks, of which the second carries nothing; jit returns the context's
    results.
    """
    xs = inputs[1]
    graphdef, state = nnx.split(layers)

    def run(state, x_BD):
        stacked = nnx.merge(graphdef, state)
        with nn.part("ar"):
            out_BD, sums = nn.scan(stacked, step, x_BD, xs, remat=remat, unroll=False)
        _, shapes = nn.scan(
            stacked,
            lambda layer, carry, _: (carry, layer.norm.scale[...]),
            None,
            remat=remat,
            unroll=False,
        )
        return out_BD, sums, shapes

    @jax.jit
    def recorded(state, x_BD):
        with nn.capture_intermediates() as records:
            return run(state, x_BD), records

    plain = run(state, inputs[0])
    got, records = recorded(state, inputs[0])
    for a, b in zip(got, plain, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < 1e-6
    assert [(r.part, r.name, r.index) for r in records] == [
        (part, "Layer", i) for part in ("ar", "") for i in range(LAYERS)
    ]
    x_BD = inputs[0]
    for i, record in enumerate(records[:LAYERS]):
        x_BD = step(unstacked(layers, i), x_BD, xs[i])[0]
        assert relative_error(record.carry, x_BD) < 1e-6
    assert [r.carry for r in records[LAYERS:]] == [None] * LAYERS


def test_layers_are_recorded_in_the_context_alone(layers, inputs):
    """Check that outside it the loop stays a loop."""

    def loops():  # a new function each time, since traces are kept by function
        run = lambda: nn.scan(layers, step, *inputs, remat="none", unroll=False)
        return str(jax.make_jaxpr(run)()).count("scan[")

    with nn.capture_intermediates() as records:
        assert (loops(), len(records)) == (0, LAYERS)
        with nn.capture_intermediates() as inner:
            assert (loops(), len(inner), len(records)) == (0, LAYERS, LAYERS)
        assert (loops(), len(records)) == (0, 2 * LAYERS)
    assert (loops(), len(records)) == (1, 2 * LAYERS)
