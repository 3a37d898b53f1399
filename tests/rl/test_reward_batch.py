"""Check concatenated rewards, and the metrics of a rollout by hand."""

import math

import numpy as np
import pytest

from blip3o_jax.config import RlConfig
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.rl.reward_batch import (
    RewardBatch,
    compute_advantages,
    concatenate,
    reward_metrics,
)

F32 = np.float32


def rewards(total, failed=None, **parts):
    failed = np.zeros(len(total), bool) if failed is None else np.array(failed)
    return RewardBatch(
        np.array(total, F32), failed, {name: np.array(x, F32) for name, x in parts.items()}
    )


def test_parts_that_are_missing_are_nan():
    """Include a batch of which every image failed, which has no parts."""
    both = concatenate(
        [rewards([1, 2], ocr=[1, 2]), rewards([0, 0], [True, True]), rewards([3], clip=[3])]
    )
    assert both.total_B.tolist() == [1, 2, 0, 0, 3] and both.failed_B.tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]
    np.testing.assert_array_equal(both.parts["ocr"], [1, 2, math.nan, math.nan, math.nan])
    np.testing.assert_array_equal(both.parts["clip"], [math.nan] * 4 + [3])
    taken = both.take(np.array([4, 0]))
    assert taken.total_B.tolist() == [3, 1] and taken.failed_B.tolist() == [False, False]
    np.testing.assert_array_equal(taken.parts["ocr"], [math.nan, 1])


def test_metrics_by_hand():
    """Use two groups of two; the second one's first image failed, so that it is degenerate."""
    cfg = RlConfig(num_generations=2, scale_rewards="none")
    of = rewards(
        [1, 3, 99, 5],
        [False, False, True, False],
        ocr=[1, 3, math.nan, 5],
        huge=[1, math.inf, 1e7, 3],
    )
    found = compute_advantages(of, cfg)
    assert found.advantage_PG.tolist() == [[-1, 1], [0, 0]]
    values = reward_metrics(
        of, found, [Prompt("a", category="one"), Prompt("b", category="two")], 2
    )
    assert (
        values["rl/reward"] == 3
        and values["rl/reward_max"] == 5
        and values["rl/frac_reward_failed"] == 0.25
    )
    assert (
        values["rl/reward_batch_std"] == pytest.approx((8 / 3) ** 0.5)
        and values["rl/frac_reward_zero_std"] == 0.5
    )
    assert values["rl/rewards/huge/mean"] == 2, "of those that have a reward and are finite"
    assert values["rl/rewards/ocr/mean"] == 3 and values["rl/reward_std"] == pytest.approx(2**0.5)
    assert values["rl/reward_by_category/one"] == 2 and values["rl/reward_by_category/two"] == 5


def test_metrics_where_every_reward_failed():
    of = rewards([0, 0], [True, True])
    values = reward_metrics(
        of, compute_advantages(of, RlConfig(num_generations=2)), [Prompt("a", category="one")], 2
    )
    assert values == {"rl/frac_reward_failed": 1.0, "rl/frac_reward_zero_std": 1.0}
