"""Clipping and schedule by hand; optimizers and schedules by name against optax itself; Muon
against the stock transformation on one matrix at a time; where their states lie, and that they
resume.
"""

import dataclasses
import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from blip3o_jax import config as config_lib
from blip3o_jax.blip3o import MODEL_PARTS, Blip3o
from blip3o_jax.train.checkpoint import Checkpoints
from blip3o_jax.train.optimizer import (
    _free_arguments,
    check_arguments,
    decayed,
    learning_rate,
    make_optimizer,
    optimizers,
    schedules,
)
from blip3o_jax.train.state import _optimizer_shardings, plan_state
from tests import tiny
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
    """Return a stack of three layers, and what Muon must leave to AdamW: a table, a head, a stacked
    norm, a convolution.
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
    """Return the updates of the last of `steps` steps; gradients are the growing parameters."""
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


def optimizer_config(**settings):
    return config_lib.OptimizerConfig(
        learning_rate=1e-2, warmup_fraction=0.1, clip_norm=0.0, **settings
    )


def not_decayed(params):
    """Return the same as `decayed`, spelled out for `_muon_params`."""
    return jax.tree.map(lambda x: True, params) | {
        "layers": {"up": {"kernel": True}, "norm": {"scale": False}, "conv": {"kernel": True}}
    }


# Settings, and the same by optax itself. Each value differs from its default.
BY_NAME = {
    "adamw": (
        {"weight_decay": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-6, "mu_dtype": "bfloat16"},
        lambda rate: optax.adamw(
            rate, 0.8, 0.9, 1e-6, mu_dtype="bfloat16", weight_decay=0.1, mask=not_decayed
        ),
    ),
    "nadamw": (
        {"weight_decay": 0.1, "kwargs": {"b2": 0.9}},
        lambda rate: optax.nadamw(rate, b2=0.9, weight_decay=0.1, mask=not_decayed),
    ),
    "lion": (
        {"weight_decay": 0.1, "mu_dtype": "bfloat16", "kwargs": (("b1", 0.8),)},
        lambda rate: optax.lion(
            rate, b1=0.8, mu_dtype="bfloat16", weight_decay=0.1, mask=not_decayed
        ),
    ),
    "adafactor": (
        {"mu_dtype": "bfloat16", "kwargs": {"min_dim_size_to_factor": 8, "momentum": 0.9}},
        lambda rate: optax.adafactor(
            rate, min_dim_size_to_factor=8, momentum=0.9, dtype_momentum="bfloat16"
        ),
    ),
    "sgd": (
        {"kwargs": {"momentum": 0.9, "nesterov": True}},
        lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    ),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_an_optimizer_by_name_is_that_of_optax(name):
    settings, stock = BY_NAME[name]
    cfg, params = optimizer_config(name=name, **settings), _muon_params()
    state = make_optimizer(cfg, 10).init(params)
    want = stock(learning_rate(cfg, 10))
    dtypes = lambda state: jax.tree.map(lambda x: x.dtype, state)
    assert dtypes(state[1]) == dtypes(want.init(params))
    got = _updates(make_optimizer(cfg, 10), params)
    for a, b in zip(*map(jax.tree.leaves, (got, _updates(want, params))), strict=True):
        np.testing.assert_array_equal(a, b)


SCHEDULES = {
    "constant_schedule": ({}, lambda: optax.constant_schedule(1e-2)),
    "cosine_decay_schedule": ({"alpha": 0.5}, lambda: optax.cosine_decay_schedule(1e-2, 40, 0.5)),
    "linear_schedule": ({}, lambda: optax.linear_schedule(1e-2, 1e-5, 40)),
    "warmup_constant_schedule": (
        {"warmup_steps": 8},
        lambda: optax.warmup_constant_schedule(0.0, 1e-2, 8),
    ),
    "piecewise_constant_schedule": (
        {"boundaries_and_scales": {10: 0.5, 20: 0.1}},
        lambda: optax.piecewise_constant_schedule(1e-2, {10: 0.5, 20: 0.1}),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_by_name_is_that_of_optax(name):
    kwargs, stock = SCHEDULES[name]
    cfg = optimizer_config(schedule={"name": name, "kwargs": kwargs})
    # As config.json brings it back.
    cfg = config_lib.from_dict(config_lib.to_dict(cfg), config_lib.OptimizerConfig)
    rate, want = learning_rate(cfg, 40), stock()
    assert [float(rate(step)) for step in range(41)] == [float(want(step)) for step in range(41)]


REFUSED = [
    *(
        ({"schedule": {"name": name, "kwargs": kwargs}}, words)
        for name, kwargs, words in (
            (
                "piecewise_constant_schedule",
                {"boundaries_and_scales": {"a": "b"}},
                "boundaries_and_scales: ValueError: invalid literal",
            ),
            (
                "piecewise_constant_schedule",
                {"boundaries_and_scales": (1, 2)},
                "boundaries_and_scales: TypeError",
            ),
            (
                "constant_schedule",
                {"value": None},
                "value=None must be of type float",
            ),
            ("constant_schedule", {"value": (1.0, 2.0)}, "must be of type float"),
            ("constant_schedule", {"value": -5.0}, "a learning rate of -5 at step 0 of"),
            ("exponential_decay", {"decay_rate": -5.0}, "a learning rate of nan at step 1 of"),
            ("cosine_decay_schedule", {"exponent": -5.0}, "choose kwargs that keep it between"),
        )
    ),
    ({"name": "Moun"}, "optimizer.name='Moun' is not one of .*; did you mean muon?"),
    (
        {"name": "adafactor", "kwargs": {"decay_rat": 0.9}},
        "optimizer.kwargs: argument 'decay_rat' of adafactor is not one of .*; "
        "did you mean decay_rate?",
    ),
    ({"kwargs": {"b1": 0.9}}, "argument 'b1' of adamw is not one of eps_root, nesterov"),
    ({"name": "muon", "kwargs": {"ns_step": 3}}, "did you mean ns_steps?"),
    *(
        ({"name": name, "kwargs": kwargs}, words)
        for name, kwargs, words in (
            (
                "sgd",
                {"momentum": "much"},
                "kwargs: sgd's momentum='much' must be of type",
            ),
            ("sgd", {"momentum": -0.9}, "sgd's momentum=-0.9 must lie between 0 and 1"),
            ("sgd", {"momentum": 10**400}, "sgd's momentum=inf must lie between 0 and 1"),
            ("sgd", {"nesterov": "no"}, "sgd's nesterov='no' must be of type bool"),
            ("rprop", {"eta_plus": 1e30}, "rprop's eta_plus=1e\\+30 must lie between"),
            ("muon", {"ns_steps": 10**9}, "muon's ns_steps=1000000000 must lie between 1 and 100"),
            ("muon", {"preconditioning": "aoll"}, "optimizer: optax.contrib.muon: "),
            ("muon", {"ns_coeffs": (1e38, 0.0, 1e38)}, "an update with a finite gradient is not"),
            ("adam", {"eps": 0}, "optax.adam: an update with a finite gradient is not finite"),
            ("rmsprop", {"initial_scale": -1.0}, "an update with a finite gradient is not finite"),
            ("adafactor", {"decay_rate": -1}, "an update with a finite gradient is not finite"),
            ("lbfgs", {}, "optimizer: optax.lbfgs: "),
        )
    ),
    ({"name": "lion", "b2": 0.5}, "optimizer.b2=0.5 is for adamw and muon"),
    ({"name": "sgd", "weight_decay": 0.1}, "optimizer.weight_decay=0.1: optax.sgd has no weight"),
    ({"name": "adabelief", "mu_dtype": "bfloat16"}, "optimizer.mu_dtype='bfloat16': optax.adab"),
    (
        {"schedule": {"name": "linear"}},
        "schedule.name='linear' is .*did you mean linear_schedule or linear_",
    ),
    ({"schedule": {"kwargs": {"init": 1}}}, "'init' of warmup_cosine_decay_schedule is not one of"),
    (
        {"schedule": {"name": "exponential_decay"}},
        "optimizer.schedule.kwargs must give decay_rate: exponential_decay has no default",
    ),
    ({"schedule": {"kwargs": {"decay_steps": "x"}}}, "decay_steps='x' must be of type int"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_optax_does_not_have_is_refused_in_one_line(settings, message):
    with pytest.raises(config_lib.ConfigError, match=message.replace("?", r"\?")) as error:
        make_optimizer(config_lib.OptimizerConfig(**settings), 10)
    assert "\n" not in str(error.value)


# Of a wrong kind, beyond any bound, or where an argument has its edge.
ODD = (-1, 0, 1, 1e30, 10**400, "x", True, (), (1.0, "x"), None)
# Optax's own signature does not say what these are.
UNTYPED = ("ns_coeffs", "boundaries_and_scales", "linesearch")


def arguments():
    for name in optimizers():
        yield from (("name", name, argument) for argument in _free_arguments(name))
    for name, make in schedules().items():
        yield from (("schedule", name, argument) for argument in inspect.signature(make).parameters)


def with_argument(place, name, argument, value):
    given = {"name": name, "kwargs": {argument: value}}
    return config_lib.OptimizerConfig(**(given if place == "name" else {"schedule": given}))


def test_every_argument_of_optax_has_a_kind_that_refuses_other_values():
    """Read signatures alone: nothing is computed."""
    found = list(arguments())
    assert len(found) > 100
    for place, name, argument in found:
        refused = 0
        for value in ODD:
            try:
                check_arguments(with_argument(place, name, argument, value))
            except config_lib.ConfigError as error:
                assert argument in str(error) and "\n" not in str(error), error
                refused += 1
        assert refused >= 3 or argument in UNTYPED, f"{name} takes any {argument}"


def refused_or_finite(settings):
    """Return whether it is refused in one line, or two updates with finite gradients are finite."""
    try:
        optimizer = make_optimizer(settings, 10)
    except config_lib.ConfigError as error:
        return "\n" not in str(error)
    params = {"layers": {"kernel": jnp.linspace(-2.0, 2.0, 24).reshape(2, 3, 4)}}
    updates = _updates(optimizer, params, steps=2)
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updates))


@pytest.mark.slow
def test_odd_arguments_of_optax_are_refused_or_give_a_finite_update():
    tried = [(*found, value) for found in arguments() for value in ODD]
    assert not [case for case in tried if not refused_or_finite(with_argument(*case))]


def test_an_optimizer_is_checked_where_transfers_are_forbidden():
    settings = optimizer_config(name="sgd", kwargs={"momentum": 0.8})
    with jax.transfer_guard("disallow"):
        make_optimizer(settings, 10)
        jax.jit(lambda: make_optimizer(settings, 10).init({"scale": jnp.zeros(3)}))()


def test_norms_biases_and_single_numbers_are_not_decayed():
    """Check it in the whole model: norms declare the logical axis "norm"."""
    cfg = tiny.run_config(model={"editing": {"reference_slots": 2, "features": True}}).model
    variables = nnx.state(nnx.eval_shape(lambda: Blip3o(cfg, MODEL_PARTS, seed=0)))
    axes = {path: v.axes for path, v in nnx.to_flat_state(variables)}
    mask = nnx.traversals.flatten_mapping(decayed(nnx.to_pure_dict(variables)))
    assert mask.keys() == axes.keys() and 50 < sum(mask.values()) < len(mask)
    for path, is_decayed in mask.items():
        norm = "norm" in axes[path]
        assert is_decayed == (not norm and path[-1] != "bias" and axes[path] != ()), path


# Where the first moment and the factors of AR kernels [layers, embed, mlp], embed over fsdp and
# mlp over tensor, lie.
LIE = {
    "adamw": {"mu": (None, "fsdp", "tensor"), "nu": (None, "fsdp", "tensor")},
    "lion": {"mu": (None, "fsdp", "tensor")},
    "adafactor": {"v_row": (None, "fsdp"), "v_col": (None, "tensor")},
}


@pytest.mark.parametrize("name", LIE)
def test_the_state_of_an_optimizer_lies_with_its_parameters(name):
    kwargs = {"min_dim_size_to_factor": 8} if name == "adafactor" else {}
    cfg, _, _ = tiny.prepared("joint")
    optimizer = {"name": name, "kwargs": tuple(kwargs.items())}
    cfg = tiny.replace_fields(cfg, {"optimizer": optimizer})
    plan = plan_state(cfg, tiny.strategy(**tiny.MESHES["fsdp_tp"]))
    for field, spec in LIE[name].items():
        at = optax.tree.get(plan.shardings["opt"], field)["ar"]["layers"]["mlp"]["up"]["kernel"]
        assert tuple(at.spec) == spec, field
    counts = optax.tree.get_all_with_path(plan.shardings["opt"], "count")
    assert counts and all(at.is_fully_replicated for _, at in counts)


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_a_sharded_state_resumes(name, tmp_path):
    """Save after one update and restore into shards: the next is that of an unbroken run."""
    kwargs = {"min_dim_size_to_factor": 8} if name == "adafactor" else {}
    optimizer = make_optimizer(optimizer_config(name=name, kwargs=kwargs), 10)
    strategy, params = tiny.strategy("fsdp", fsdp=8), {"part": {"kernel": jnp.ones((16, 8))}}
    at = {"part": {"kernel": strategy.sharding("ar", ("embed", None), (16, 8))}}
    shapes = {"params": params, "opt": jax.eval_shape(optimizer.init, params)}
    where = _optimizer_shardings(shapes["opt"], params, at, strategy.replicated())
    shardings = {"params": at, "opt": where}

    @functools.partial(jax.jit, out_shardings=shardings)
    def step(state):
        grads = jax.tree.map(lambda x: x * jnp.arange(1.0, 9.0), state["params"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}

    start = {"params": params, "opt": optimizer.init(params)}
    once = step(step(jax.device_put(start, shardings)))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.open(tiny.run_config(), None)
    checkpoints.save(1, once, {}, 1.0)
    checkpoints.close()
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    restored, _ = checkpoints.restore(1, types.SimpleNamespace(abstract=abstract))
    got, want = step(restored), step(once)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(want["params"]["part"]["kernel"] - 1).max()) > 1e-3
