"""How a rollout is cut."""

import dataclasses

import pytest

from blip3o_jax.config import ConfigError, RlConfig, SamplingConfig
from blip3o_jax.rl.rollout_programs import has_reference, images_per_prefix, num_micro_batches


@pytest.mark.parametrize(
    ("group", "prompts", "shards", "want"),
    [(16, 8, 8, 16), (16, 8, 1, 16), (16, 2, 8, 4), (16, 1, 16, 1), (6, 1, 4, 1), (6, 2, 4, 3)],
)
def test_as_many_images_share_a_prefix_as_leave_every_device_one(group, prompts, shards, want):
    assert images_per_prefix(group, prompts, shards) == want


@pytest.mark.parametrize(
    ("prompts", "group", "at_once", "want"),
    [(8, 16, 128, 1), (8, 16, 64, 2), (8, 16, 8, 8), (6, 4, 16, 2)],
)
def test_micro_batches_are_whole_groups_and_equally_many(prompts, group, at_once, want):
    rollout = SamplingConfig(top_k=0, top_p=1.0, batch_size=at_once)
    assert (
        num_micro_batches(RlConfig(num_prompts=prompts, num_generations=group, rollout=rollout))
        == want
    )


def test_temperature_0_is_for_policies_that_sample_no_tokens():
    greedy = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0)
    assert RlConfig(policy="flow", rollout=greedy).rollout.temperature == 0
    for policy in ("ar", "both"):
        with pytest.raises(
            ConfigError,
            match=f"rl.rollout.temperature=0 leaves rl.policy={policy} nothing to compare",
        ):
            RlConfig(policy=policy, rollout=greedy)


def test_there_is_a_reference_policy_where_a_divergence_is_weighed():
    cfg = RlConfig(policy="ar", kl_coef=0.0)
    assert not has_reference(cfg) and has_reference(dataclasses.replace(cfg, kl_coef=0.1))
    assert has_reference(dataclasses.replace(cfg, policy="flow")) and has_reference(
        dataclasses.replace(cfg, policy="both")
    )
