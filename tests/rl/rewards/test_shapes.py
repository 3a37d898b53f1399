import numpy as np
import pytest

from blip3o_jax.config import UserError
from blip3o_jax.data.shapes import prompts, render, sample
from blip3o_jax.rl.rewards.shapes import create

COUNT = 28


@pytest.fixture(scope="module")
def asked():
    return prompts("test", COUNT)


@pytest.fixture(scope="module")
def drawn():
    return np.stack([render(sample(0, index, "test"), 48) for index in range(COUNT)])


def test_right_images_score_one_at_any_weight(asked, drawn):
    for weight in ("0", "0.5", "1"):
        scores = create(correct_weight=weight)(drawn, [""] * COUNT, asked)
        np.testing.assert_array_equal(scores.total_B, np.ones(COUNT, np.float32))
        assert scores.total_B.dtype == np.float32


def test_wrong_images_score_below_the_right_ones_by_degree(asked, drawn):
    """Score each image against the next prompt of its category: some are nearly right."""
    scores = create()(np.roll(drawn, 7, axis=0), [""] * COUNT, asked)
    correct_B, shaped_B = scores.parts["correct"], scores.parts["shaped"]
    wrong = correct_B == 0
    assert shaped_B[wrong].max() < 1 and len(set(shaped_B[wrong])) > 3
    np.testing.assert_array_equal(
        scores.total_B, np.float32(0.5) * correct_B + np.float32(0.5) * shaped_B
    )
    assert scores.total_B[wrong].max() < 0.5


def test_the_weight_mixes_both():
    """Score the object of a scene where it and another one of its colour are asked: two of four
    facts."""
    image = render(sample(0, 0, "test"), 48)
    (thing,) = sample(0, 0, "test").things
    other = "star" if thing.shape != "star" else "ring"
    objects = [
        {"shape": shape, "colour": thing.colour, "size": None, "count": 1}
        for shape in (thing.shape, other)
    ]
    asked = {"category": "attribution", "objects": objects, "relation": None, "word": None}
    for weight, wanted in ((0.0, 0.5), (0.25, 0.375), (1.0, 0.0)):
        scores = create(correct_weight=str(weight))(image[None], [""], [asked])
        assert scores.total_B.tolist() == [wanted] and scores.parts["shaped"].tolist() == [0.5]


def test_prompts_of_another_kind_are_refused(asked):
    create().check("a circle", asked[0])
    with pytest.raises(
        UserError, match="prompt 'a dog' is without objects, relation, word: use the prompts_"
    ):
        create().check("a dog", {"category": "single"})
    with pytest.raises(UserError, match="of category 'dogs'"):
        create().check("a dog", asked[0] | {"category": "dogs"})


@pytest.mark.parametrize("weight", ["1.5", "half"])
def test_a_weight_is_a_share(weight):
    with pytest.raises(
        UserError, match=f"reward shapes: correct_weight='{weight}' must be a number in 0 .. 1"
    ):
        create(correct_weight=weight)
