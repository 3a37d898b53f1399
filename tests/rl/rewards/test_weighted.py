"""Compute the sum by hand, and check every way in which a number is no score."""

import numpy as np
import pytest

from blip3o_jax.config import ConfigError, RewardConfig, UserError
from blip3o_jax.rl.rewards.weighted import WeightedRewards, labels

USER = "python:tests.rl.rewards.scorers."
IMAGES = np.broadcast_to(
    np.array([0, 51, 255], np.uint8)[:, None, None, None], (3, 4, 4, 3)
)  # brightness 0, 0.2, 1


def judge(*configs: RewardConfig, do: str = "", row: int = 1):
    metadata = [{"do": do} if i == row else {} for i in range(3)]
    return WeightedRewards(configs)(IMAGES, ["", "a", "bc"], metadata)


def test_the_sum_by_hand():
    outcome = judge(
        RewardConfig(USER + "brightness", weight=-0.5, clip=(0.1, 0.4), options=(("scale", "1"),)),
        RewardConfig(USER + "obedient", weight=3.0),
    )
    # -0.5 * (0.1, 0.2, 0.4) + 3 * (0, 0.2, 1); float32 sums of two.
    np.testing.assert_allclose(outcome.total_B, [-0.05, 0.5, 2.8], rtol=3e-7)
    assert outcome.total_B.dtype == np.float32 and outcome.reasons == [None] * 3
    assert list(outcome.parts) == ["brightness", "obedient", "obedient/length"]
    np.testing.assert_allclose(
        outcome.parts["brightness"], [0, 0.2, 1], rtol=1e-6
    )  # as they were, not clipped
    assert outcome.parts["obedient/length"].tolist() == [0, 1, 2]


def test_the_same_reward_twice_has_two_names():
    configs = [RewardConfig(name) for name in ("ocr", USER + "brightness", "ocr", "shapes", "ocr")]
    assert labels(configs) == ["ocr", "brightness", "ocr#2", "shapes", "ocr#3"]


@pytest.mark.parametrize(
    ("do", "clip", "reason"),
    [
        ("nan", None, "obedient: its score is nan"),
        ("nan", (0.0, 1.0), "obedient: its score is nan"),
        ("infinite", (0.0, 1.0), "obedient: its score is -inf"),
        ("beyond float32", (0.0, 1.0), "obedient: its score is inf"),
        ("huge", None, "obedient: its score is beyond 1e+06; set clip if that is meant"),
        ("huge", (0.0, 1.0), None),
        ("large", None, None),
    ],
)
def test_what_is_no_score_fails_its_image_alone(do, clip, reason):
    outcome = judge(RewardConfig(USER + "obedient", clip=clip), do=do)
    assert outcome.reasons == [None, reason, None]
    assert np.isnan(outcome.total_B).tolist() == [False, reason is not None, False]


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("short", "returned scores of shape [2] for 3 images"),
        ("short part", "returned part length of shape [2] for 3 images"),
        ("column", "returned scores of shape [3, 1] for 3 images"),
        ("raise", "RuntimeError: no mood"),
        ("words", "ValueError: could not convert string to float"),
        ("nothing", "returned scores of shape [] for 3 images"),
        ("exit", "SystemExit: 2"),
    ],
)
def test_what_is_no_answer_fails_all(do, reason):
    outcome = judge(RewardConfig(USER + "brightness"), RewardConfig(USER + "obedient"), do=do)
    assert np.isnan(outcome.total_B).all()
    assert len(outcome.reasons) == 3 and all(
        reason in r and "\n" not in r and len(r) < 250 for r in outcome.reasons
    )


def test_an_image_keeps_the_first_reason():
    outcome = judge(RewardConfig(USER + "obedient"), RewardConfig(USER + "obedient"), do="nan")
    assert outcome.reasons == [None, "obedient: its score is nan", None]


def test_a_prompt_is_checked_by_every_reward():
    rewards = WeightedRewards((RewardConfig(USER + "brightness"), RewardConfig("shapes")))
    with pytest.raises(UserError, match="reward shapes: prompt 'a dog'"):
        rewards.check("a dog", {})


def test_no_reward_is_an_error():
    with pytest.raises(ConfigError, match=r"rl\.rewards is empty"):
        WeightedRewards(())
