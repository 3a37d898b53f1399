"""Clipping and schedule by hand; Muon against the stock transformation on one matrix at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip3o_jax import config as config_lib
from blip3o_jax.train.optimizer import learning_rate, make_optimizer
from tests.conftest import relative_error


def test_clipping():
    cfg = config_lib.OptimizerConfig(learning_rate=1.0, clip_norm=2.0)
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}

    def first_moment(cfg):
        optimizer = make_optimizer(cfg, 10)
        _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
        return optax.tree.get(state, "mu")

    clipped = first_moment(cfg)
    assert relative_error(clipped["a"], [0.1 * 3 * 2 / 5, 0]) < 1e-6
    assert relative_error(clipped["b"], [0.1 * 4 * 2 / 5]) < 1e-6
    assert relative_error(first_moment(dataclasses.replace(cfg, clip_norm=10.0))["b"], [0.4]) < 1e-6
    assert relative_error(first_moment(dataclasses.replace(cfg, clip_norm=0.0))["b"], [0.4]) < 1e-6


def test_schedule():
    cfg = config_lib.OptimizerConfig(
        learning_rate=1e-3, end_learning_rate=1e-4, warmup_fraction=0.1
    )
    rate = learning_rate(cfg, 100)
    want = {0: 0, 5: 5e-4, 10: 1e-3, 55: (1e-3 + 1e-4) / 2, 100: 1e-4}
    assert {step: float(rate(step)) for step in want} == pytest.approx(want, rel=1e-5, abs=1e-9)
    assert [float(learning_rate(cfg, 1)(step)) for step in (0, 1)] == pytest.approx([0, 1e-3])


def _muon_params():
    """A stack of three layers, and what Muon must leave to AdamW: a table, a head, a stacked norm,
    a convolution.
    """
    shapes = {
        "layers": {
            "up": {"kernel": (3, 8, 20)},
            "norm": {"scale": (3, 8)},
            "conv": {"kernel": (3, 3, 3, 1, 8)},
        },
        "embedding": (12, 8),
        "lm_head": {"kernel": (8, 12)},
    }
    keys = iter(jax.random.split(jax.random.key(0), 10))
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _updates(optimizer, params, steps=3):
    """The updates of the last of `steps` steps; the gradients are the parameters, growing."""
    state = optimizer.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda p, step=step: (step + 1) * p + step, params)
        updates, state = optimizer.update(grads, state, params)
    return updates


def test_muon_takes_each_layer_of_a_stack_for_a_matrix_of_its_own():
    settings = {"muon_beta": 0.9, "weight_decay": 0.01, "eps": 1e-6}  # none the default
    cfg = config_lib.OptimizerConfig(
        name="muon", learning_rate=1e-2, warmup_fraction=0.1, clip_norm=0.0, **settings
    )
    params = _muon_params()
    got = _updates(make_optimizer(cfg, 10), params)["layers"]["up"]["kernel"]
    alone = optax.contrib.muon(
        learning_rate(cfg, 10), beta=0.9, weight_decay=0.01, eps=1e-6, consistent_rms=0.2
    )
    for layer, kernel in zip(got, params["layers"]["up"]["kernel"], strict=True):
        want = _updates(alone, {"kernel": kernel})["kernel"]
        assert relative_error(layer, want) < 1e-5
        # Orthogonal up to what five steps of Newton-Schulz leave, and as long as an update of
        # AdamW.
        rate = float(learning_rate(cfg, 10)(2))
        singular = np.linalg.svd(np.asarray(layer), compute_uv=False) / (0.2 * rate * np.sqrt(20))
        assert 0.6 < singular.min() <= singular.max() < 1.3
        assert 0.5 < float(jnp.sqrt(jnp.mean(layer**2))) / (0.2 * rate) < 1.5


def test_muon_leaves_all_but_stacked_matrices_to_adamw():
    cfg = config_lib.OptimizerConfig(
        learning_rate=1e-2, warmup_fraction=0.1, clip_norm=0.0, weight_decay=0.1
    )
    params = _muon_params()
    want = _updates(make_optimizer(cfg, 10), params)
    got = _updates(make_optimizer(dataclasses.replace(cfg, name="muon"), 10), params)
    assert (
        relative_error(got["layers"]["up"].pop("kernel"), want["layers"]["up"].pop("kernel")) > 0.1
    )
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-6, path
