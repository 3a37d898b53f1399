"""Check how a rollout is split, and the policies that sample it."""

import jax.numpy as jnp
import pytest

from blip3o_jax.config import Config, ConfigError, RlConfig, SamplingConfig
from blip3o_jax.rl.log_probs import TokenScores
from blip3o_jax.rl.loss import make_loss
from blip3o_jax.rl.registry import POLICIES, has_reference, make_policies
from blip3o_jax.rl.rollout_programs import images_per_prefix, num_micro_batches
from blip3o_jax.rl.token_policy import TokenPolicy


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


def policies(**rl):
    return make_policies(Config(rl=RlConfig(**rl)))


def test_temperature_0_is_for_policies_that_sample_no_tokens():
    greedy = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0)
    assert len(policies(policy="flow", rollout=greedy)) == 1
    for policy in ("ar", "both"):
        with pytest.raises(
            ConfigError,
            match=f"rl.rollout.temperature=0 leaves rl.policy={policy} nothing to compare",
        ):
            policies(policy=policy, rollout=greedy)


def test_an_unknown_policy_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"rl.policy='flaw' is not one of .*did you mean flow"):
        policies(policy="flaw")


def test_there_is_a_reference_policy_where_a_divergence_is_weighed():
    assert not has_reference(policies(policy="ar", kl_coef=0.0))
    assert has_reference(policies(policy="ar", kl_coef=0.1))
    assert has_reference(policies(policy="flow")) and has_reference(policies(policy="both"))


class Reinforce(TokenPolicy):
    """Implement REINFORCE as an algorithm in a separate file would."""

    def loss(self, model, arrays, weights, image_ids, share):
        scores = self.score(model, arrays, image_ids, share)
        return -jnp.mean(weights.advantage_B[:, None] * scores.logprobs_BN), {}


def test_an_algorithm_is_a_policy_and_a_row_of_the_table(monkeypatch):
    monkeypatch.setitem(POLICIES, "reinforce", (Reinforce,))
    scores = TokenScores(jnp.full((2, 3), -2.0), jnp.zeros((2, 3)))
    monkeypatch.setattr(Reinforce, "score", lambda self, *_: scores)
    config = Config(rl=RlConfig(policy="reinforce", num_prompts=1, num_generations=2))
    valid = jnp.ones(2)
    batch = {"advantage": jnp.array([1.0, 0.5]), "valid": valid, "valid_fraction": valid}
    value, metrics = make_loss(config, (0, 8), 1)(None, batch, None)
    assert float(value) == 1.5 and not metrics
