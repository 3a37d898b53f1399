import numpy as np
import pytest

from blip3o_jax.config import ConfigError, RewardConfig
from blip3o_jax.rl.rewards import registry

USER = "python:tests.rl.rewards.scorers."
IMAGES = np.full((2, 4, 4, 3), 51, np.uint8)


def test_a_reward_is_made_with_its_options():
    reward = registry.make(RewardConfig("shapes", options=(("correct_weight", "0.25"),)))
    assert reward.correct_weight == 0.25


def test_a_users_function_is_a_reward():
    reward = registry.make(RewardConfig(USER + "brightness", options=(("scale", "2"),)))
    scores = reward(IMAGES, ["", ""], [{}, {}])
    np.testing.assert_allclose(scores.total_B, [0.4, 0.4], rtol=1e-6)
    assert scores.total_B.dtype == np.float32 and scores.parts == {}
    reward.check("anything", {})
    assert registry.make(RewardConfig(USER + "obedient"))(IMAGES, ["a", "bc"], [{}, {}]).parts[
        "length"
    ].tolist() == [1, 2]
    registry.make(RewardConfig(USER + "any_options", options=(("whatever", "1"),)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shape", {}, "unknown reward 'shape': did you mean shapes?"),
        (
            "xyz",
            {},
            "unknown reward 'xyz': there is ocr, geneval, shapes, clip, siglip, http, "
            "python:MODULE.FUNCTION",
        ),
        ("", {}, "unknown reward ''"),
        (
            "shapes",
            {"correct_wieght": "1"},
            "reward shapes has no option 'correct_wieght': did you mean correct_weight?",
        ),
        ("python:brightness", {}, "must be python:MODULE.FUNCTION"),
        (
            "python:no.such.module.f",
            {},
            "module no.such.module cannot be imported (No module named 'no')",
        ),
        (USER + "dark", {}, "module tests.rl.rewards.scorers has no function dark"),
        (USER + "not_callable", {}, "has no function not_callable"),
        (USER + "with_threshold", {}, "with_threshold needs its option threshold"),
        (
            USER + "brightness",
            {"scal": "1"},
            "brightness has no option 'scal': did you mean scale?",
        ),
        (USER + "brightness", {"prompts": "1"}, "brightness has no option 'prompts'"),
        (
            USER + "of_images_alone",
            {},
            "of_images_alone cannot be called with (images, prompts, metadata): too many "
            "positional",
        ),
        (
            "python:tests.rl.rewards.fails_when_imported.score",
            {},
            "fails when it is imported: ZeroDivisionError: division by zero",
        ),
        ("python:builtins.max", {}, "no signature found for builtin"),
    ],
)
def test_mistakes_are_reported_in_one_line(name, options, message):
    with pytest.raises(ConfigError) as e:
        registry.make(RewardConfig(name, options=tuple(options.items())))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_reward_of_the_command_line():
    assert registry.parsed("ocr") == RewardConfig("ocr")
    assert registry.parsed("python:a.b.c,scale=2") == RewardConfig(
        "python:a.b.c", options=(("scale", "2"),)
    )
    path = "geneval,detector=transformers,path=/d=1"
    assert registry.parsed(path).options == (("detector", "transformers"), ("path", "/d=1"))
    servers = "http,urls=http://a:8000,http://b:8000,batch=2"
    assert registry.parsed(servers).options == (
        ("urls", "http://a:8000,http://b:8000"),
        ("batch", "2"),
    )
    found = registry.parsed("clip,weight=-0.5,path=/d,clip=-1:0.5")
    assert found == RewardConfig("clip", -0.5, (-1.0, 0.5), (("path", "/d"),))
    for text, words in (
        ("ocr,weight=much", "weight='much' must be a number"),
        ("ocr,weight=nan", "weight='nan' must be a number"),
        ("ocr,clip=1", "clip='1' must be LOW:HIGH"),
        ("ocr,clip=1:0", "must be \\(low, high\\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            registry.parsed(text)
    with pytest.raises(ConfigError, match="'detector' is no option: write NAME,OPTION=VALUE"):
        registry.parsed("geneval,detector")
