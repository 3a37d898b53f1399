"""Measure the scorer's accuracy: on images that it must accept, on those that it must reject, and
on images that are not clean."""

import collections
import random
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from blip3o_jax.data.shapes import captions, draw, scene, scorer
from blip3o_jax.data.shapes.detect import Detection, detect

COUNT = 2_000
SIZE = 48  # the demo's
Filter = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@pytest.fixture(scope="module")
def held_out() -> list[tuple[scene.Scene, captions.Metadata, np.ndarray]]:
    scenes = [scene.sample(0, index, "test") for index in range(COUNT)]
    return [(drawn, captions.describe(drawn)[1], draw.render(drawn, SIZE)) for drawn in scenes]


@pytest.fixture(scope="module")
def detections(held_out: list) -> list[Detection]:
    return [detect(image) for _, _, image in held_out]


def accuracy(detections: list[Detection], held_out: list) -> float:
    return float(
        np.mean(
            [
                scorer.score_detection(found, metadata).correct
                for found, (_, metadata, _) in zip(detections, held_out, strict=True)
            ]
        )
    )


def test_clean_images_are_right(held_out: list, detections: list[Detection]) -> None:
    assert accuracy(detections, held_out) >= 0.99


def test_clean_images_are_read_completely(held_out: list, detections: list[Detection]) -> None:
    """Check that every object is detected with its attributes, and its place to half a pixel."""
    exact = 0
    for found, (drawn, _, _) in zip(detections, held_out, strict=True):
        if drawn.word:
            exact += found.word is not None and found.word.text == drawn.word.text
            continue
        pairs = list(
            zip(sorted(found.things, key=_place), sorted(drawn.things, key=_place), strict=False)
        )
        exact += len(found.things) == len(drawn.things) and all(
            (a.shape, a.colour, a.size) == (b.shape, b.colour, b.size)
            and max(abs(a.x - b.x), abs(a.y - b.y)) < 0.5 / SIZE
            for a, b in pairs
        )
    assert exact / COUNT >= 0.99


def _place(thing: scene.Thing) -> tuple[float, float]:
    return round(thing.x, 1), thing.y


def test_mismatched_pairs_are_rejected(held_out: list, detections: list[Detection]) -> None:
    """Score each image with another scene's prompt, unless the scene satisfies that too; once with
    any prompt, once with a prompt of the same category, which is the harder half."""
    rng = random.Random(0)
    accepted = tried = 0
    for same_category in (False, True):
        for i, (drawn, _, _) in enumerate(held_out):
            step = 7 if same_category else 1
            other = (i + step * rng.randrange(1, COUNT // step)) % COUNT
            metadata = held_out[other][1]
            if not scorer.satisfies(drawn, metadata):
                tried += 1
                accepted += scorer.score_detection(detections[i], metadata).correct
    assert tried > COUNT
    assert accepted / tried <= 0.05


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    del rng
    stored = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
    return np.ascontiguousarray(cv2.imdecode(stored, cv2.IMREAD_COLOR)[..., ::-1])


def _soft(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blurred = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 0.7)
    return np.clip(np.rint(blurred + rng.normal(0, 6, image.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("spoil", [_jpeg, _soft])
def test_spoiled_images_are_right(held_out: list, spoil: Filter, rng: np.random.Generator) -> None:
    some = held_out[:700]
    assert accuracy([detect(spoil(image, rng)) for _, _, image in some], some) >= 0.93


@pytest.mark.parametrize("size", [64, 128])
def test_another_resolution(held_out: list, size: int) -> None:
    some = held_out[:140]
    assert accuracy([detect(draw.render(drawn, size)) for drawn, _, _ in some], some) >= 0.99


@pytest.mark.parametrize("image", ["white", "noise", "black", "smear"])
def test_images_of_nothing_satisfy_nothing(
    held_out: list, image: str, rng: np.random.Generator
) -> None:
    pixels = {
        "white": np.full((64, 64, 3), 255, np.uint8),
        "noise": rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
        "black": np.zeros((64, 64, 3), np.uint8),
        "smear": cv2.GaussianBlur(held_out[1][2], (0, 0), 8.0),
    }[image]
    found = detect(pixels)
    assert not any(
        scorer.score_detection(found, metadata).correct for _, metadata, _ in held_out[:140]
    )


@pytest.mark.parametrize(
    "points",
    [
        [(0, -1), (1, 0), (0, 1), (-1, 0)],
        [(0, 1), (-1, -0.8), (1, -0.8)],
        [(-1, -0.6), (1, -0.6), (1, 0.6), (-1, 0.6)],
    ],
)
def test_foreign_shapes_are_not_recognised(points: list) -> None:
    """Draw a diamond, a triangle upside down and a long rectangle."""
    mask = np.zeros((512, 512), np.uint8)
    cv2.fillPoly(mask, [np.rint(np.array(points) * 96 + 256).astype(np.int32)], 255)
    covered = cv2.resize(mask, (64, 64), interpolation=cv2.INTER_AREA)[..., None] / 255
    image = np.rint(255 + covered * (np.array([28, 96, 220]) - 255)).astype(np.uint8)
    (thing,) = detect(image).things
    assert (thing.shape, thing.colour) == (None, "blue")


def _asked(
    shape: str, colour: str | None = None, size: str | None = None, count: int = 1
) -> captions.Metadata:
    return {"shape": shape, "colour": colour, "size": size, "count": count}


def _prompt(
    category: str, *objects: captions.Metadata, relation: str | None = None, word: str | None = None
) -> captions.Metadata:
    return {"category": category, "objects": list(objects), "relation": relation, "word": word}


RED = scene.Thing("circle", "red", 0.25, 0.5, 0.27)
BLUE = scene.Thing("square", "blue", 0.75, 0.5, 0.27)
BLOB = scene.Thing(None, "green", 0.5, 0.85, 0.2)


@pytest.mark.parametrize(
    ("things", "prompt", "reason"),
    [
        ((RED, BLUE), _prompt("two", _asked("circle"), _asked("square")), None),
        (
            (RED, BLUE),
            _prompt("single", _asked("circle", size="small")),
            None,
        ),  # extra objects are allowed
        (
            (RED, BLUE),
            _prompt("single", _asked("circle", size="large")),
            "asked a large circle, found 1 small red circle, 1 small",
        ),
        (
            (RED, RED),
            _prompt("counting", _asked("circle", count=3)),
            "asked 3 circles, found 2 small red circles",
        ),
        ((RED, RED), _prompt("counting", _asked("circle", count=2)), None),
        (
            (RED, RED, RED),
            _prompt("counting", _asked("circle", count=2)),
            "asked 2 circles, found 3 small red circles",
        ),
        (
            (RED, RED, BLOB),
            _prompt("counting", _asked("circle", count=2)),
            "asked 2 circles, found 2 small red circles, 1 unclear",
        ),
        (
            (RED, BLUE),
            _prompt("position", _asked("circle"), _asked("square"), relation="left of"),
            None,
        ),
        (
            (RED, BLUE),
            _prompt("position", _asked("circle"), _asked("square"), relation="above"),
            "found the circle elsewhere",
        ),
        (
            (RED, BLUE),
            _prompt("attribution", _asked("circle", "blue"), _asked("square", "red")),
            "asked a blue circle, found",
        ),
        (
            (RED,),
            _prompt("attribution", _asked("circle", "red"), _asked("circle", "red")),
            "asked a red circle and a red circle",
        ),
        ((RED, BLOB), _prompt("colours", _asked("circle", "red")), None),  # a small blob is no mess
        (
            (RED, BLOB, BLOB),
            _prompt("colours", _asked("circle", "red")),
            "found 1 small red circle, 2 unclear objects",
        ),
        ((), _prompt("colours", _asked("circle", "red")), "asked a red circle, found nothing"),
        ((RED,), _prompt("text", word="CAT"), 'asked the word "CAT", found nothing readable'),
    ],
)
def test_rules(things: tuple, prompt: captions.Metadata, reason: str | None) -> None:
    result = scorer.score_detection(Detection(things, None, has_paper=True), prompt)
    assert result.correct == (reason is None)
    assert (reason or "as asked") in result.reason


SMALL_RED = _asked("circle", "red", "small")


@pytest.mark.parametrize(
    ("things", "prompt", "met"),
    [
        ((), _prompt("single", SMALL_RED), 0),
        ((RED,), _prompt("single", SMALL_RED), 1),
        ((RED,), _prompt("single", _asked("circle", "blue", "small")), 2 / 3),
        ((RED,), _prompt("single", _asked("circle", "blue", "large")), 1 / 3),
        (
            (RED,),
            _prompt("single", _asked("star", "red", "small")),
            0,
        ),  # its colour is the colour of another object
        ((RED, BLOB, BLOB), _prompt("single", SMALL_RED), 3 / 4),  # a mess
        ((RED, BLUE), _prompt("two", _asked("circle"), _asked("square")), 1),
        ((RED,), _prompt("two", _asked("circle"), _asked("square")), 1 / 2),
        (
            (RED,),
            _prompt("attribution", _asked("circle", "red"), _asked("circle", "red")),
            1 / 2,
        ),  # one answers once
        (
            (RED, BLUE),
            _prompt("attribution", _asked("circle", "blue"), _asked("square", "blue")),
            3 / 4,
        ),
        (
            (RED, BLUE),
            _prompt("position", _asked("circle"), _asked("square"), relation="left of"),
            1,
        ),
        (
            (RED, BLUE),
            _prompt("position", _asked("circle"), _asked("square"), relation="above"),
            2 / 3,
        ),
        (
            (RED,),
            _prompt("position", _asked("circle"), _asked("square"), relation="left of"),
            1 / 3,
        ),
        ((RED, RED), _prompt("counting", _asked("circle", count=2)), 1),
        ((RED, RED), _prompt("counting", _asked("circle", count=3)), 2 / 3),
        ((RED, RED, RED), _prompt("counting", _asked("circle", count=2)), 2 / 3),
        ((RED, RED, BLOB), _prompt("counting", _asked("circle", count=2)), 2 / 3),
        ((RED, RED), _prompt("counting", _asked("circle", "blue", count=2)), 1 / 2),
        ((BLUE, BLUE), _prompt("counting", _asked("circle", count=2)), 0),
    ],
)
def test_the_share_that_is_met(things: tuple, prompt: captions.Metadata, met: float) -> None:
    result = scorer.score_detection(Detection(things, None, has_paper=True), prompt)
    assert result.met == pytest.approx(met, rel=1e-12)
    assert result.correct == (met == 1)


@pytest.mark.parametrize(
    ("read", "met"), [("CAT", 1), ("COT", 2 / 3), ("CATS", 3 / 4), ("AT", 0), ("cat", 1), (None, 0)]
)
def test_letters_are_met_in_their_places(read: str | None, met: float) -> None:
    found = Detection((), scene.Word(read, 0.5, 0.5) if read else None, has_paper=True)
    assert scorer.score_detection(found, _prompt("text", word="CAT")).met == pytest.approx(
        met, rel=1e-12
    )


def test_all_is_met_exactly_where_the_image_is_right(
    held_out: list, detections: list[Detection]
) -> None:
    """Score each image with its own prompt, and with two others of its category."""
    shares = collections.Counter()
    for i, found in enumerate(detections):
        for step in (0, 7, 70):
            result = scorer.score_detection(found, held_out[(i + step) % COUNT][1])
            assert 0 <= result.met <= 1 and (result.met == 1) == result.correct
            shares[result.met] += 1
    assert shares[0] and shares[1] and len(shares) > 6


def test_without_a_background_nothing_is_met() -> None:
    assert (
        scorer.score_detection(
            Detection((), None, has_paper=False), _prompt("text", word="CAT")
        ).met
        == 0
    )


def test_words_are_compared_exactly_but_for_case() -> None:
    found = Detection((), scene.Word("CAT", 0.5, 0.5), has_paper=True)
    assert scorer.score_detection(found, _prompt("text", word="cat")).correct
    assert (
        scorer.score_detection(found, _prompt("text", word="CATS")).reason
        == 'asked the word "CATS", read "CAT"'
    )


def test_only_square_uint8_images_are_taken() -> None:
    with pytest.raises(ValueError, match="uint8"):
        scorer.score(np.zeros((64, 64, 3), np.float32), _prompt("text", word="CAT"))
    with pytest.raises(ValueError, match="square"):
        scorer.score(np.zeros((64, 32, 3), np.uint8), _prompt("text", word="CAT"))
