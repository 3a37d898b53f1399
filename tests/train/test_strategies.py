"""Every strategy, on every stage, gives what one device gives: the loss and each gradient, two
steps deep.

The networks are those of tests/tiny/ in float32, the devices eight of the CPU. Sums are in
another order: 1e-5 of each array's norm. The default run has a case of each family of strategies
and of each stage; `pytest -m slow` the whole table. Sampling is in tests/test_pipeline.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.parallel.rules import STRATEGIES
from blip3o_jax.train.stages import STAGES, make_loss
from blip3o_jax.train.state import create_state, plan_state
from blip3o_jax.train.train_step import make_step
from tests import tiny
from tests.train.states import check_close, leaves, moments

# The stages; in "cached" codes and latents of a joint run come with the batch instead of from the
# encoders in the step.
CASES = (*STAGES, "cached")
DEFAULT = {
    ("autoencoder", "dp"),
    ("contrastive", "fsdp"),
    ("tokenizer", "hybrid"),
    ("cached", "fsdp_tp"),
    ("cached", "hybrid_fsdp_sp"),
    ("cached", "a mixture"),
}


@functools.cache
def setup(case):
    """Return (configuration, image_token_offset, batch): the learning rate is at its height from
    the second step on.
    """
    cfg, image_token_offset, batch = tiny.prepared("joint" if case == "cached" else case)
    optimizer = dataclasses.replace(cfg.optimizer, ema_decay=0.75, warmup_fraction=0.1)
    batch = tiny.cached_batch(cfg, batch) if case == "cached" else batch
    return dataclasses.replace(cfg, optimizer=optimizer), image_token_offset, batch


@functools.cache
def initial(stage):
    """Return the initial state on one device, as numpy arrays."""
    cfg, _, _ = setup(stage)
    return jax.device_get(create_state(cfg, plan_state(cfg, tiny.strategy())))


@functools.cache
def two_steps(case, name):
    """Return (state after two steps as it lies on the devices, metrics of each step, plan) from the
    initial state of one device.
    """
    cfg, image_token_offset, batch = setup(case)
    strategy = tiny.strategy(**tiny.MESHES[name]) if name else tiny.strategy()
    plan = plan_state(cfg, strategy)
    step = make_step(cfg, plan, strategy, make_loss(cfg, image_token_offset))
    state = jax.device_put(initial("joint" if case == "cached" else case), plan.shardings)
    metrics = []
    for _ in range(2):
        state, values = step(
            jax.tree.map(jnp.copy, state), jax.device_put(batch, strategy.batch_sharding())
        )
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics, plan


def seen(tree):
    """Return {path: array}, but for the biases of attention's keys: they add the same to all scores
    of a query, so that their gradient is zero, and what rounding leaves of it Adam turns into a
    step of full length.
    """
    return {path: x for path, x in leaves(tree) if "['key']['bias']" not in path}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, marks=() if (case, name) in DEFAULT else pytest.mark.slow)
        for case in CASES
        for name in tiny.MESHES
    ],
)
def test_sharded_is_single_device(case, name):
    """Allow rounding: the moments carry the gradients of both steps, the second ones their squares,
    whose relative error is twice theirs: the autoencoder's reaches 1e-5, which is what one unit in
    the last place of its weights makes on one device.
    """
    want, want_metrics, _ = two_steps(case, None)
    got, metrics, _ = two_steps(case, name)
    for a, b in zip(metrics, want_metrics, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-5)
    (first, second), (want_first, want_second) = moments(got), moments(want)
    check_close(seen(first), seen(want_first), 1e-5)
    check_close(seen(second), seen(want_second), 2e-5 if case == "autoencoder" else 1e-5)
    for tree in (first, want_first):
        rounding = [np.linalg.norm(x) for path, x in leaves(tree) if path not in seen(tree)]
        assert all(
            norm < 1e-7 * np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
            for norm in rounding
        )
    check_close(seen(got["params"]), seen(want["params"]), 1e-5)
    check_close(seen(got["ema"]), seen(want["ema"]), 1e-5)


def test_parameters_and_moments_really_lie_in_shards():
    state, _, plan = two_steps("cached", "fsdp_tp")
    kernel = lambda tree: tree["ar"]["layers"]["mlp"]["up"]["kernel"]
    for tree in (state["params"], state["ema"], *moments(state)):
        assert kernel(tree).shape == (2, 32, 64)
        assert {shard.data.shape for shard in kernel(tree).addressable_shards} == {(2, 16, 32)}
        assert tree["ar"]["embedding"].addressable_shards[0].data.shape == (360 // 2, 32 // 2)
        assert tree["ar"]["norm"]["scale"].sharding.is_fully_replicated
    frozen = state["frozen"]["dit"]["patch_embed"]["kernel"]
    assert not frozen.sharding.is_fully_replicated
    placed = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, plan.shardings
    )
    assert all(jax.tree.leaves(placed))


def test_no_strategy_is_left_out():
    """Check that those that are not in the table have the rules of one that is, under another
    name.
    """
    left = set(STRATEGIES) - {mesh["name"] for mesh in tiny.MESHES.values()}
    assert left == {"hybrid_dp", "hybrid_fsdp"}
    assert (
        STRATEGIES["hybrid_dp"] == STRATEGIES["dp"]
        and STRATEGIES["hybrid_fsdp"] == STRATEGIES["hybrid"]
    )
