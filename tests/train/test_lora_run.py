"""A run with low-rank factors: what it starts from, what it trains, and what may be started from
it.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from blip3o_jax import lora
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import UserError
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from blip3o_jax.train import checkpoint
from blip3o_jax.train.initialize import match_to_plan, restore_or_create
from blip3o_jax.train.stages import make_loss
from blip3o_jax.train.state import merge_trees, plan_state, without
from blip3o_jax.train.train_step import make_step
from tests import tiny
from tests.convert.test_verify import drawn
from tests.train.states import leaves, moments

FACTORS = {"ar": {"lora": {"rank": 2}}, "dit": {"lora": {"rank": 3, "targets": ("q", "expand")}}}


def weights(state):
    """Return {path: array} of all parts."""
    return dict(leaves(merge_trees(state["params"], state["frozen"])))


def is_factor(path):
    return path.endswith(tuple(f"['{name}']" for name in lora.FACTORS))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a checkpoint of all parts without factors."""
    workdir = tmp_path_factory.mktemp("start")
    checkpoint.write_weights(workdir / "checkpoints", *drawn(tiny.run_config(tiny.data()), workdir))
    return workdir


@pytest.fixture(scope="module")
def settings(start):
    """Return the settings of a run from there that trains factors alone."""
    model = checkpoint.read_config(checkpoint.find(start)[0]).model
    cfg = tiny.run_config(
        tiny.data(),
        steps=3,
        trainable=(".*/lora_.*",),
        checkpoint={"init_from": tuple((part, str(start)) for part in PUBLISHED_PARTS)},
    )
    return dataclasses.replace(cfg, model=tiny.replace_fields(model, FACTORS))


@pytest.fixture(scope="module")
def begun(settings, tmp_path_factory):
    """Return the state that it begins with."""
    return begin(settings, tmp_path_factory.mktemp("begun"))


def begin(cfg, place):
    checkpoints = checkpoint.Checkpoints(place, 1)
    state, _, step = restore_or_create(
        cfg, plan_state(cfg, tiny.strategy()), tiny.strategy(), checkpoints, 0
    )
    checkpoints.close()
    assert step == 0
    return state


def test_a_checkpoint_without_factors_is_taken_whole_and_factors_are_drawn(settings, start, begun):
    """Initialise the factors as in a new model."""
    given = dict(leaves(checkpoint.restore_parts(start, tiny.strategy(), PUBLISHED_PARTS)))

    @jax.jit
    def factors():
        model = Blip3o(settings.model, lora.LORA_PARTS, seed=settings.seed)
        return {
            path: x for path, x in leaves(nnx.to_pure_dict(nnx.state(model))) if is_factor(path)
        }

    new, got = factors(), weights(begun)
    assert len(new) == 2 * (7 + 3) and not any(
        np.any(x) for path, x in new.items() if "lora_b" in path
    )
    assert got.keys() == new.keys() | given.keys()
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, (new if is_factor(path) else given)[path], err_msg=path)


def test_factors_alone_are_trained_and_have_optimizer_state(settings, begun, tmp_path):
    plan, image_token_offset = plan_state(settings, tiny.strategy()), tiny.prepared()[1]
    step = make_step(settings, plan, tiny.strategy(), make_loss(settings, image_token_offset))
    state = begun
    for _ in range(settings.steps):  # in the first the rate is 0, in the second B moves, and then A
        state, _ = step(state, tiny.cached_batch(settings, tiny.prepared()[2]))
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.open(settings, None)
    checkpoints.save(settings.steps, state, {"next_example": 0}, 1.0)
    checkpoints.close()
    before, trained = weights(begun), {path for path, _ in leaves(state["params"])}
    assert trained == {path for path in before if is_factor(path)}
    for path, leaf in weights(state).items():
        assert np.array_equal(leaf, before[path]) != (path in trained), path
    for moment in moments(state):
        assert {path for path, _ in leaves(moment)} == trained
    # Who goes on from here has the same factors, or none.
    again = tuple((part, str(tmp_path)) for part in PUBLISHED_PARTS)
    further = dataclasses.replace(
        settings, checkpoint=dataclasses.replace(settings.checkpoint, init_from=again)
    )
    for path, leaf in weights(begin(further, tmp_path / "again")).items():
        np.testing.assert_array_equal(leaf, weights(state)[path], err_msg=path)
    for changes, part in (
        ({"ar": {"lora": {"rank": 0}}}, "ar"),
        ({"ar": {"lora": {"alpha": 1.0}}}, "ar"),
        ({"dit": {"lora": {"targets": ("q",)}}}, "dit"),
    ):
        other = dataclasses.replace(further, model=tiny.replace_fields(further.model, changes))
        with pytest.raises(
            UserError,
            match=f"part {part} of {tmp_path} .* set model.{part}.lora as .* or merge .*export",
        ) as e:
            begin(other, tmp_path / "other")
        assert "\n" not in str(e.value)


def test_nothing_but_factors_may_be_missing(settings, begun):
    plan = plan_state(settings, tiny.strategy())
    ar = merge_trees(begun["params"]["ar"], begun["frozen"]["ar"])
    del ar["layers"]["attention"]["q"]["lora_a"]
    with pytest.raises(
        UserError, match=r"part ar of x and of this model differ, first in .*\['q'\]\['lora_a'\]"
    ):
        match_to_plan(plan, "ar", ar, "x")
    ar = lora.drop_factors(ar)
    match_to_plan(plan, "ar", ar, "x")
    del ar["norm"]
    with pytest.raises(
        UserError, match=r"part ar of x and of this model differ, first in \['norm'\]\['scale'\]"
    ):
        match_to_plan(plan, "ar", ar, "x")


def test_without():
    """Remove a branch whose leaves are all removed."""
    a = {"x": {"y": 1, "z": 2}, "u": {"v": 3}, "w": 4}
    assert without(a, {"x": {"y": 9}, "u": {"v": 9}}) == {"x": {"z": 2}, "w": 4}
    assert without(a, {}) == a and without(a, {"x": {}}) == a and without(a, a) == {}
    assert merge_trees(without(a, {"x": {"y": 1}}), {"x": {"y": 1}}) == a
