import numpy as np
import pytest

from blip3o_jax.evaluation import shapes

COUNT = 140


@pytest.fixture(scope="module")
def asked():
    return shapes.prompts(COUNT)


@pytest.fixture(scope="module")
def drawn():
    return shapes.real_images(COUNT, 64)


def test_every_category_is_asked_equally_often(asked):
    names, counts = np.unique([prompt["category"] for prompt in asked], return_counts=True)
    assert len(names) == 7 and set(counts) == {COUNT // 7}


def test_real_images_score_one(asked, drawn):
    """Check these 140 scenes, on which the scorer makes no mistake; over 2,000 it is right on 99
    %."""
    result = shapes.score_outputs(drawn, asked)
    assert result.overall == 1.0 and set(result.categories.values()) == {1.0}
    assert result.correct == [True] * COUNT and set(result.reasons) == {"as asked"}


def test_shuffled_images_score_near_the_floor(asked, drawn):
    result = shapes.score_outputs(np.roll(drawn, 3, axis=0), asked)
    # A few are right by chance: a scene with two objects may hold the one another prompt asks for.
    assert result.overall < 0.1
    assert all(
        reason
        for correct, reason in zip(result.correct, result.reasons, strict=True)
        if not correct
    )


def test_random_images_are_the_floor(asked):
    images_BHWC = shapes.random_images(COUNT, 64)
    assert images_BHWC.shape == (COUNT, 64, 64, 3) and images_BHWC.dtype == np.uint8
    assert shapes.score_outputs(images_BHWC, asked).overall < 0.1


def test_overall_is_the_mean_over_categories(asked, drawn):
    """Make all of one category right, nothing else; that category twice as often as the others."""
    prompts = [*asked[:7], asked[0]]
    images_BHWC = np.full((8, 64, 64, 3), 255, np.uint8)
    images_BHWC[[0, 7]] = drawn[0]
    result = shapes.score_outputs(images_BHWC, prompts)
    assert result.correct == [True, *[False] * 6, True]
    assert result.categories[asked[0]["category"]] == 1.0
    assert result.overall == pytest.approx(1 / 7)
