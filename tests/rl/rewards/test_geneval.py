"""Check the reward on the shapes data set's own images, and its thresholds on a detector with
hand-made detections."""

import numpy as np
import pytest

from blip3o_jax.config import UserError
from blip3o_jax.data.shapes import draw
from blip3o_jax.data.shapes.scene import Background, Scene, Thing
from blip3o_jax.rl.rewards import geneval
from blip3o_jax.rl.rewards.geneval_rules import Found

PLAIN = Background("plain", (255, 255, 255), (240, 240, 240), (1.0, 0.0), 0.125)


def picture(*things: Thing) -> np.ndarray:
    return draw.render(Scene("", "", (), things, None, PLAIN), 64)


RED_CIRCLE = Thing("circle", "red", 0.2, 0.5, 0.26)
BLUE_STAR = Thing("star", "blue", 0.8, 0.5, 0.27)


@pytest.mark.parametrize(
    "tag, include, exclude, wanted",
    [
        ("single_object", [{"class": "circle", "count": 1}], [], [1, 1, 0]),
        (
            "two_object",
            [{"class": "circle", "count": 1}, {"class": "star", "count": 1}],
            [],
            [1, 0, 0],
        ),
        ("colors", [{"class": "circle", "count": 1, "color": "red"}], [], [1, 0, 0]),
        (
            "counting",
            [{"class": "circle", "count": 2}],
            [{"class": "circle", "count": 3}],
            [0, 1, 0],
        ),
        (
            "position",
            [
                {"class": "star", "count": 1},
                {"class": "circle", "count": 1, "position": ["left of", 0]},
            ],
            [],
            [1, 0, 0],
        ),
        (
            "color_attr",
            [
                {"class": "star", "count": 1, "color": "blue"},
                {"class": "circle", "count": 1, "color": "red"},
            ],
            [],
            [1, 0, 0],
        ),
    ],
)
def test_on_drawn_shapes(tag, include, exclude, wanted):
    # The larger circle is the surer one: blue, though there is a red one.
    circles = picture(RED_CIRCLE, Thing("circle", "blue", 0.67, 0.5, 0.52))
    images_BHWC = np.stack([picture(RED_CIRCLE, BLUE_STAR), circles, picture()])
    asked = {"tag": tag, "include": include, "exclude": exclude, "prompt": ""}
    reward = geneval.create(scoring="correct")
    reward.check("", asked)
    scores = reward(images_BHWC, [""] * 3, [asked] * 3)
    assert scores.total_B.dtype == np.float32
    np.testing.assert_array_equal(scores.total_B, wanted)
    np.testing.assert_array_equal(scores.parts["correct"], wanted)
    np.testing.assert_array_equal(scores.parts["shaped"] == 1, np.array(wanted, bool))


def test_the_shapes_detector_gives_boxes_in_pixels():
    (circle,) = geneval.ShapesDetector().detect(picture(Thing("circle", "red", 0.25, 0.5, 0.26)))
    np.testing.assert_allclose(
        circle.box,
        [(0.25 - 0.13) * 64, (0.5 - 0.13) * 64, (0.25 + 0.13) * 64, (0.5 + 0.13) * 64],
        atol=0.5,
    )
    assert (circle.name, circle.colour) == ("circle", "red")


class Sees:
    """Return the same detections for every image."""

    classes, colours = ("dog",), ("red",)

    def __init__(self, *confidences: float):
        self.confidences = confidences

    def detect(self, image_HWC):
        return [Found("dog", (0, 0, 9, 9), confidence) for confidence in self.confidences]

    def colours_of(self, image_HWC, found):
        return [("red", "blue")[int(image_HWC[0, 0, 0])] for _ in found]


IMAGES_BHWC = np.stack([np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)])


def test_counting_asks_for_more_confidence():
    two = {"include": [{"class": "dog", "count": 2}]}
    reward = geneval.Geneval(Sees(0.95, 0.85))
    np.testing.assert_array_equal(
        reward(IMAGES_BHWC[:1], [""], [{"tag": "two_object", **two}]).total_B, [1]
    )
    np.testing.assert_array_equal(
        reward(IMAGES_BHWC[:1], [""], [{"tag": "counting", **two}]).total_B, [0.5]
    )


def test_no_more_than_max_objects_of_a_class_are_seen():
    asked = {"tag": "counting", "include": [{"class": "dog", "count": 17}]}
    assert geneval.Geneval(Sees(*[0.95] * 20))(IMAGES_BHWC[:1], [""], [asked]).parts["correct"] == 0
    assert (
        geneval.Geneval(Sees(*[0.95] * 20), max_objects=17)(IMAGES_BHWC[:1], [""], [asked]).parts[
            "correct"
        ]
        == 1
    )


def test_each_image_is_scored_by_its_own_colours():
    asked = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    scores = geneval.Geneval(Sees(0.9))(IMAGES_BHWC, ["", ""], [asked] * 2)
    np.testing.assert_array_equal(scores.total_B, [1, 0.5])
    np.testing.assert_array_equal(scores.parts["correct"], [1, 0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"detector": "eyes"}, "detector='eyes' is not one of shapes, transformers"),
        ({"path": "somewhere"}, "detector=shapes has no weights"),
        ({"threshold": "2"}, "threshold='2' must be a number in 0 .. 1"),
        ({"scoring": "half"}, "scoring='half' is not one of shaped, correct"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        geneval.create(**options)


def test_a_class_that_the_detector_does_not_know_is_refused_when_it_is_loaded():
    with pytest.raises(UserError, match=r"has no class 'dog' \(prompt 'a dog'\)"):
        geneval.create().check(
            "a dog", {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
        )
