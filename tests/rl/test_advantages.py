import numpy as np
import pytest

from blip3o_jax.rl.advantages import choose_groups, group_advantages


def all_valid(rewards) -> np.ndarray:
    return np.ones_like(rewards, dtype=bool)


def test_deviation_is_unbiased():
    # Mean 2, squares 1 + 0 + 1 over n - 1 = 2: deviation 1.
    rewards = np.asarray([[1.0, 2.0, 3.0]])
    got = group_advantages(rewards, all_valid(rewards), scale_rewards="group", epsilon=0.25)
    np.testing.assert_array_equal(got.advantage_PG, np.float32([[-0.8, 0, 0.8]]))
    assert got.advantage_PG.dtype == np.float32
    assert (got.mean_P, got.std_P) == (2, 1) and not got.degenerate_P.any()


def test_mean_only():
    rewards = np.asarray([[0.0, 0.0, 1.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
    got = group_advantages(rewards, all_valid(rewards), scale_rewards="none", epsilon=1e-4)
    np.testing.assert_array_equal(
        got.advantage_PG, np.float32([[-0.25, -0.25, 0.75, -0.25], [3, -1, -1, -1]])
    )


def test_failed_rewards_are_outside_their_group():
    rewards = np.asarray([[1.0, np.nan, 3.0, 100.0], [5.0, 1.0, 1.0, 2.0]])
    mask = np.asarray([[True, False, True, False], [True, True, True, False]])
    got = group_advantages(rewards, mask, scale_rewards="none", epsilon=0)
    np.testing.assert_array_equal(got.mean_P, [2, 7 / 3])
    np.testing.assert_allclose(got.std_P, [np.sqrt(2), np.sqrt(16 / 3)], rtol=1e-15)
    np.testing.assert_allclose(
        got.advantage_PG, [[-1, 0, 1, 0], [8 / 3, -4 / 3, -4 / 3, 0]], rtol=1e-7
    )


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_equal_rewards_give_exactly_nothing(scale_rewards):
    rewards = np.asarray(
        [
            [0.1] * 3,  # their mean in float64 is not 0.1, so a computed deviation is not 0
            [0.1 + 0.2, 0.3, 0.3],  # equal sums, of different roundings
            [0.0] * 3,
            [-7.3] * 3,
            [0.3, 0.3, 0.3001],
        ]
    )
    assert rewards[1, 0] != rewards[1, 1]
    got = group_advantages(rewards, all_valid(rewards), scale_rewards=scale_rewards, epsilon=0)
    np.testing.assert_array_equal(got.degenerate_P, [True, True, True, True, False])
    np.testing.assert_array_equal(got.advantage_PG[:4], 0)
    assert np.all(got.advantage_PG[4] != 0)


def test_fewer_than_two_valid_are_degenerate():
    mask = np.asarray([[True, False], [False, False], [True, True]])
    got = group_advantages(np.asarray([[1.0, 2.0]] * 3), mask, scale_rewards="group", epsilon=0)
    np.testing.assert_array_equal(got.degenerate_P, [True, True, False])
    np.testing.assert_array_equal(got.advantage_PG[:2], 0)
    np.testing.assert_array_equal(got.mean_P, [1, np.nan, 1.5])
    np.testing.assert_array_equal(got.std_P, [np.nan, np.nan, np.sqrt(0.5)])


def test_a_valid_reward_that_is_not_finite_is_refused():
    rewards = np.asarray([[1.0, 2.0], [np.inf, 0.0]])
    with pytest.raises(ValueError, match=r"\[\[1, 0\]\]"):
        group_advantages(rewards, all_valid(rewards), scale_rewards="group", epsilon=1e-4)


@pytest.mark.parametrize(
    ("degenerate", "want"),
    [
        ([False, True, False], [0, 2, 1]),  # one rollout: all of them
        ([True, False, True, False, False, False], [1, 3, 4]),
        ([True, False, True, False, True], [1, 3, 0]),
        ([True] * 5, [0, 1, 2]),
    ],
)
def test_groups_with_a_difference_come_first(degenerate, want):
    assert choose_groups(np.asarray(degenerate), 3).tolist() == want


def test_too_few_groups():
    with pytest.raises(ValueError, match="2 groups cannot fill a rollout of 3"):
        choose_groups(np.asarray([False, False]), 3)
