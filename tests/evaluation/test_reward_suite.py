"""Check any reward as a suite."""

import json

import numpy as np
import pytest

from blip3o_jax.config import UserError
from blip3o_jax.evaluation import shapes
from blip3o_jax.evaluation.registry import find_suite


def brightness(images_BHWC, prompts, metadata):
    """Return NaN for the prompt "unknown"."""
    return np.where(
        [p == "unknown" for p in prompts], np.nan, images_BHWC.mean(axis=(1, 2, 3)) / 255
    )


def written(tmp_path, lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_shapes_reward_says_what_the_shapes_suite_says(tmp_path):
    asked = shapes.prompts(14)
    images = shapes.real_images(14, 64)
    images[::3] = 255
    suite = find_suite("shapes", written(tmp_path, asked))
    prompts = suite.prompts(99, 0)
    assert [p["caption"] for p in prompts] == [p["caption"] for p in asked]
    got, want = suite.score_outputs(images, prompts), shapes.score_outputs(images, asked)
    assert (got.correct, got.categories, got.overall) == (
        want.correct,
        want.categories,
        want.overall,
    )
    assert got.reasons[1] == "correct 1, shaped 1" and got.means["score"] == pytest.approx(9 / 14)
    others = suite.baselines(images, prompts, 0)["images_of_other_prompts"]
    assert others.overall < 0.3 < want.overall


def test_every_prompt_has_as_many_images_as_asked_for(tmp_path):
    file = written(tmp_path, [{"prompt": "a"}, {"prompt": "b", "tag": "counting"}, {"prompt": "c"}])
    suite = find_suite("python:tests.evaluation.test_reward_suite.brightness", file, 2)
    assert len(suite.prompts(None, 0)) == 6, "the whole file"
    prompts = suite.prompts(2, 0)
    assert [(p["caption"], p["category"]) for p in prompts] == [("a", "all")] * 2 + [
        ("b", "counting")
    ] * 2
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (255, 0, 255, 255)])
    got = suite.score_outputs(images, prompts)
    assert got.correct == [True, False, True, True] and got.means["score"] == pytest.approx(0.75)
    assert got.categories == {"all": 0.5, "counting": 1.0} and got.overall == 0.75
    assert suite.baselines(images, prompts, 0)["images_of_other_prompts"].correct == [
        True,
        True,
        True,
        False,
    ]


def test_an_image_that_cannot_be_scored_is_wrong(tmp_path):
    suite = find_suite(
        "python:tests.evaluation.test_reward_suite.brightness",
        written(tmp_path, [{"prompt": "unknown"}, {"prompt": "a"}]),
    )
    prompts, images = suite.prompts(2, 0), np.full((2, 8, 8, 3), 255, np.uint8)
    got = suite.score_outputs(images, prompts)
    assert (
        got.correct == [False, True]
        and got.reasons[0] == "not scored"
        and got.means["score"] == 0.5
    )
    with pytest.raises(
        UserError, match=r"none of 1 images could be scored: brightness: its score is nan"
    ):
        suite.score_outputs(images[:1], prompts[:1])


def test_prompts_are_looked_at_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match="reward shapes: prompt 'a' is without category"):
        find_suite("shapes", written(tmp_path, [{"prompt": "a"}])).prompts(9, 0)


@pytest.mark.parametrize(
    ("suite", "lines", "message"),
    [
        ("shapes,foo=1", None, "suite shapes takes no options: leave out foo=1"),
        ("shapes_qa,foo=1", [], "suite shapes_qa takes no options: leave out foo=1"),
        ("shapes_qa", [], "suite shapes_qa has prompts of its own: leave out --prompts_file"),
    ],
)
def test_a_suite_with_prompts_takes_no_others(tmp_path, suite, lines, message):
    with pytest.raises(UserError, match=message):
        find_suite(suite, lines if lines is None else written(tmp_path, lines))
