"""Check which rewards run because a directory names them."""

import inspect
import shlex

import pytest

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards import geneval, ocr, shapes
from blip3o_jax.rl.rewards.registry import REWARDS, parsed
from blip3o_jax.rl.rewards.trust import LOCAL, check_trusted, is_local

LOCAL_ONES = (
    RewardConfig("shapes", weight=0.5),
    RewardConfig("ocr", options=(("scoring", "reference"), ("min_side", "64"))),
    RewardConfig(
        "geneval", clip=(0.0, 1.0), options=(("detector", "shapes"), ("scoring", "correct"))
    ),
)
FOREIGN = (
    RewardConfig("python:os.system"),
    RewardConfig(
        "http",
        weight=-0.25,
        options=(("urls", "http://a:8000,http://b:8000"), ("token_env", "HOME")),
    ),
    RewardConfig(
        "geneval", options=(("detector", "transformers"), ("path", "/d"), ("colour_path", "/c d"))
    ),
    RewardConfig("geneval", options=(("path", "/d"),)),
    RewardConfig("clip", clip=(-0.5, 0.75), options=(("path", "run"),)),
    RewardConfig("siglip"),
    RewardConfig("no such reward"),
    RewardConfig("shapes", options=(("path", "/d"),)),
    RewardConfig("geneval", options=(("detector", "transformers"), ("detector", "shapes"))),
)


def test_the_local_ones_run():
    assert all(map(is_local, LOCAL_ONES))
    check_trusted(LOCAL_ONES, "config.json")


def test_every_option_is_decided():
    """Check that a new option is not trusted by default."""
    places = {"path", "colour_path"}
    for module in (shapes, ocr, geneval):
        name = module.__name__.rpartition(".")[2]
        assert set(inspect.signature(module.create).parameters) - places == LOCAL[name]
    assert set(REWARDS) - set(LOCAL) == {"clip", "siglip", "http"}


@pytest.mark.parametrize("reward", FOREIGN, ids=lambda reward: f"{reward.name} {reward.options}")
def test_the_others_have_to_be_named(reward):
    """Name flags that make the very same rewards, with weights and clips."""
    assert not is_local(reward)
    with pytest.raises(
        UserError,
        match=r"^DIR/config.json names the reward .*: a run's directory does not decide",
    ) as error:
        check_trusted((*LOCAL_ONES, reward), "DIR/config.json")
    flags = shlex.split(str(error.value).partition("repeat the command with ")[2])
    assert tuple(parsed(flag.removeprefix("--reward=")) for flag in flags) == (*LOCAL_ONES, reward)


def test_what_no_flag_can_say():
    """Check that no control sequence of a terminal is printed either."""
    for reward in (
        RewardConfig("python:a.b\x1b[2J\n"),
        RewardConfig("http", options=(("urls", "http://a?x=1,y=2"),)),
    ):
        with pytest.raises(UserError, match=r"--reward=NAME,OPTION=VALUE for each") as error:
            check_trusted((reward,), "DIR/config.json")
        assert str(error.value).isprintable()
