"""Check that the demo's report draws the metrics that its stages write."""

import dataclasses

import jax
import numpy as np
import pytest

from blip3o_jax.config import RewardConfig, RlConfig
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.demo.chain import CURVES, NOTES
from blip3o_jax.demo.recipe import recipe, reinforcement
from blip3o_jax.evaluation import shapes
from blip3o_jax.rl import reward_batch
from blip3o_jax.rl.loss import make_loss as make_rl_loss
from blip3o_jax.rl.reward_batch import RewardBatch
from blip3o_jax.rl.rewards.weighted import WeightedRewards
from blip3o_jax.train import loop
from blip3o_jax.train.stages import make_loss
from blip3o_jax.train.state import plan_state
from blip3o_jax.train.train_step import make_step
from tests import tiny

DEMO_STAGES = tuple(recipe("data", "cache"))


def names(cfg, loss, batch) -> set[str]:
    """Return the names of the metrics of a step, which is only traced."""
    plan = plan_state(cfg, tiny.strategy())
    _, metrics = jax.eval_shape(make_step(cfg, plan, tiny.strategy(), loss), plan.abstract, batch)
    return set(loop.with_groups(dict.fromkeys(metrics, 0.0)))


def test_every_stage_has_curves_and_a_note():
    assert set(CURVES) == set(NOTES) == {*DEMO_STAGES, "rl"}


@pytest.mark.parametrize("stage", DEMO_STAGES)
def test_curves_of_a_stage_are_metrics_of_its_step(stage):
    cfg, image_token_offset, batch = tiny.prepared(stage)
    assert set(CURVES[stage]) <= names(cfg, make_loss(cfg, image_token_offset), batch)


def test_curves_of_reinforcement_learning_are_metrics_of_its_rewards_and_step():
    cfg, image_token_offset, _ = tiny.prepared("joint")
    ids, N = (
        (image_token_offset, image_token_offset + cfg.model.tokenizer.codebook_size),
        cfg.model.tokenizer.num_tokens,
    )
    rewards = (RewardConfig(name="shapes"),)
    cfg = dataclasses.replace(
        cfg, trainable=("ar/.*",), rl=RlConfig(num_prompts=4, num_generations=2, rewards=rewards)
    )
    record = {"tokens": np.ones((8, 6), np.int32), "lengths": np.full(8, 5, np.int32)}
    record |= {"image_ids": np.full((8, N), image_token_offset, np.int32)}
    record |= {name: np.zeros((8, N), np.float32) for name in ("logprobs", "reference_logprobs")}
    record |= {name: np.ones(8, np.float32) for name in ("advantage", "valid")}
    found = names(cfg, make_rl_loss(cfg, ids, 1), record | {"bad_records": np.zeros(8, np.int32)})

    asked = shapes.prompts(2)
    outcome = WeightedRewards(rewards)(
        shapes.real_images(2, 64), [p["caption"] for p in asked], asked
    )
    rewards = RewardBatch(outcome.total_B, np.zeros(2, bool), outcome.parts)
    prompts = [Prompt(asked[0]["caption"], asked[0], asked[0]["category"])]
    found |= set(
        reward_batch.reward_metrics(
            rewards,
            reward_batch.compute_advantages(rewards, RlConfig(num_generations=2)),
            prompts,
            2,
        )
    )
    assert set(CURVES["rl"]) <= found


def test_the_demo_trains_with_the_reward_that_its_curves_are_of(monkeypatch):
    monkeypatch.setattr(
        "blip3o_jax.demo.recipe.from_checkpoint", lambda path, trained: tiny.run_config()
    )
    (reward,) = reinforcement("", "").rl.rewards
    assert f"rl/rewards/{reward.name}/correct/mean" in CURVES["rl"]
