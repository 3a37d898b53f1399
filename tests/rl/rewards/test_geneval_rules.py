"""Check GenEval's rules on hand-made detections, tag by tag."""

import numpy as np
import pytest

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards.geneval_rules import (
    COLOURS,
    RELATIONS,
    Found,
    apply_rules,
    check_metadata,
    keep,
    relations,
)


def box(x: float, y: float, side: float = 10) -> tuple[float, float, float, float]:
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def dog(
    x: float = 50,
    y: float = 50,
    confidence: float = 0.95,
    colour: str | None = None,
    name: str = "dog",
) -> Found:
    return Found(name, box(x, y), confidence, colour=colour)


def result(found, tag, include, exclude=(), threshold=0.3):
    metadata = {"tag": tag, "include": include, "exclude": list(exclude)}
    check_metadata(metadata, ("dog", "cat", "bus"), COLOURS)
    return apply_rules(
        keep(found, threshold, 16), metadata, lambda things: [thing.colour for thing in things]
    )


def test_presence():
    asked = [{"class": "dog", "count": 1}]
    assert result(
        [dog(), dog(), dog(name="cat")], "single_object", asked
    ).correct  # others do no harm
    missing = result([dog(name="cat")], "single_object", asked)
    assert (missing.correct, missing.met, missing.reason) == (False, 0, "asked 1 dog, found 0")


def test_two_objects():
    asked = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]
    assert result([dog(), dog(name="cat")], "two_object", asked).met == 1
    assert result([dog(), dog()], "two_object", asked).met == 0.5


@pytest.mark.parametrize(
    "count, correct, met",
    [(0, 0, 0), (1, 0, 1 / 3), (2, 0, 2 / 3), (3, 1, 1), (4, 0, 7 / 8), (8, 0, 0.5)],
)
def test_counting_is_exact(count, correct, met):
    """Check the official line, which asks for three and refuses four. An empty image scores 0; one
    too many costs 1/4 of the second requirement, five too many all of it."""
    asked, refused = [{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}]
    found = result([dog(x=9 * i) for i in range(count)], "counting", asked, refused)
    assert (found.correct, found.met) == (count == 3, pytest.approx(met))


def test_colours_are_those_of_the_surest_objects():
    asked = [{"class": "dog", "count": 1, "color": "red"}]
    assert result(
        [dog(colour="red", confidence=0.9), dog(colour="blue", confidence=0.8)], "colors", asked
    ).correct
    other = result(
        [dog(colour="red", confidence=0.8), dog(colour="blue", confidence=0.9)], "colors", asked
    )
    assert (other.correct, other.met, other.reason) == (False, 0.5, "asked red dog, found blue")
    two = [{"class": "dog", "count": 2, "color": "red"}]
    assert result([dog(colour="red"), dog(colour="blue")], "colors", two).met == 0.75
    assert result([dog(colour="red")], "colors", two).met == 0.5
    assert result([], "colors", asked).met == 0


def test_color_attribution_binds_the_colours():
    asked = [
        {"class": "dog", "count": 1, "color": "red"},
        {"class": "cat", "count": 1, "color": "blue"},
    ]
    assert result([dog(colour="red"), dog(colour="blue", name="cat")], "color_attr", asked).correct
    swapped = result([dog(colour="blue"), dog(colour="red", name="cat")], "color_attr", asked)
    assert (swapped.correct, swapped.met) == (False, 0.5)


@pytest.mark.parametrize(
    "dx, dy, expected",
    [
        (-100, 0, {"left of"}),
        (100, 0, {"right of"}),
        (0, -100, {"above"}),
        (0, 100, {"below"}),
        (100, 100, {"right of", "below"}),  # (100 - 2) / 141 is 0.69
        (0, 0, set()),
        (1.9, 0, set()),  # within a tenth of both sizes
        (3.9, 0, set()),  # (3.9 - 2) / 3.9 is 0.49
        (4.1, 0, {"right of"}),
        (55, 100, {"below"}),  # (55 - 2) / 114 is 0.46
        (-65, -100, {"left of", "above"}),  # (65 - 2) / 119 is 0.53
    ],
)
def test_relations_by_the_margin(dx, dy, expected):
    assert relations(box(200 + dx, 200 + dy), box(200, 200)) == expected


def test_the_margin_grows_with_the_boxes():
    assert relations(box(0, 0, 40), box(15, 0, 60)) == set()  # 15 - 10 is a third of the distance
    assert relations(box(0, 0, 10), box(15, 0, 10)) == {"left of"}


def test_position():
    asked = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    assert result([dog(10), dog(90, name="cat")], "position", asked).correct
    other = result([dog(90), dog(10, name="cat")], "position", asked)
    assert (other.correct, other.met, other.reason) == (
        False,
        pytest.approx(2 / 3),
        "dog is not left of the cat",
    )
    assert result([dog(10)], "position", asked).met == pytest.approx(
        1 / 3
    )  # no target, no relation
    # Only the surest of each class count.
    assert result(
        [dog(10, confidence=0.9), dog(99, confidence=0.5), dog(90, name="cat")], "position", asked
    ).correct


def test_every_pair_must_stand_in_the_relation():
    asked = [{"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["above", 0]}]
    cats = [dog(0, 90, name="cat"), dog(0, 10, name="cat")]
    half = result([dog(0, 50), *cats], "position", asked)
    assert (half.correct, half.met) == (False, pytest.approx((1 + 1 + 0.5) / 3))


def test_a_target_of_the_wrong_colour_is_no_target():
    asked = [
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "position": ["left of", 0]},
    ]
    found = result([dog(10), dog(90, name="cat", colour="blue")], "position", asked)
    assert not found.correct and "dog is not left of the cat" in found.reason
    assert found.met == pytest.approx(
        3 / 4
    )  # both there, in the right places, one in the wrong colour


def test_exclude_alone_spoils_an_image():
    asked, refused = [{"class": "dog", "count": 1}], [{"class": "bus", "count": 1}]
    assert result([dog()], "single_object", asked, refused).met == 1
    found = result([dog(), dog(name="bus")], "single_object", asked, refused)
    assert (found.correct, found.met, found.reason) == (
        False,
        0.5,
        "asked fewer than 1 bus, found 1",
    )


def test_clauses_are_independent():
    asked = [{"class": "dog", "count": 1}, {"class": "dog", "count": 1}]
    assert result([dog()], "two_object", asked).correct


def test_thresholds_and_the_most_that_is_kept():
    found = [dog(confidence=c) for c in (0.3, 0.31, 0.95)]
    assert [thing.confidence for thing in keep(found, 0.3, 16)["dog"]] == [
        0.95,
        0.31,
    ]  # above, not at
    assert [thing.confidence for thing in keep(found, 0.3, 1)["dog"]] == [0.95]
    assert keep(found, 0.99, 16) == {}


def test_all_is_met_exactly_where_the_result_is_correct(rng):
    corrects = 0
    for _ in range(500):
        names, colours = rng.choice(["dog", "cat", "bus"], 5), rng.choice(["red", "blue"], 5)
        x, y = rng.integers(0, 100, (2, 5))
        found = [dog(x[i], y[i], 0.9, colours[i], names[i]) for i in range(rng.integers(6))]
        asked = [
            {"class": name, "count": int(rng.integers(1, 3))}
            for name in rng.choice(["dog", "cat"], 2)
        ]
        if rng.integers(2):
            asked[0]["color"] = "red"
        if rng.integers(2):
            asked[1]["position"] = [str(rng.choice(RELATIONS)), 0]
        refused = [{"class": "bus", "count": int(rng.integers(1, 3))}] if rng.integers(2) else []
        got = result(found, "position", asked, refused)
        assert got.correct == (got.met == 1) and 0 <= got.met <= 1
        corrects += got.correct
    assert 20 < corrects < 480


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"include": [{"class": "dog", "count": 1}]}, "has no 'tag'"),
        ({"tag": "colors"}, "there is no object to score"),
        ({"tag": "colors", "include": {"class": "dog"}}, "include must be a list of objects"),
        (
            {"tag": "colors", "include": [{"class": "cow", "count": 1}]},
            r"include\[0\]: the detector has no class 'cow'",
        ),
        ({"tag": "colors", "include": [{"class": "dog", "count": 0}]}, r"include\[0\]: count=0"),
        ({"tag": "colors", "include": [{"class": "dog", "count": True}]}, r"count=True"),
        (
            {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "mauve"}]},
            "color='mauve' is not one of red",
        ),
        (
            {"tag": "p", "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]},
            "an earlier clause",
        ),
        (
            {
                "tag": "p",
                "include": [{"class": "dog", "count": 1}],
                "exclude": [{"class": "cow", "count": 1}],
            },
            r"exclude\[0\]",
        ),
    ],
)
def test_metadata_that_cannot_be_scored(metadata, message):
    with pytest.raises(UserError, match=message):
        check_metadata(metadata, ("dog", "cat"), COLOURS)


def test_shares_are_plain_numbers():
    assert isinstance(result([dog()], "single_object", [{"class": "dog", "count": 1}]).met, float)
    assert np.isfinite(result([], "single_object", [{"class": "dog", "count": 1}]).met)
