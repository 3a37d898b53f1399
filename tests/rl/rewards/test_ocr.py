"""Compare the distance and the scorings with hand-computed values; run the real recogniser on
rendered text."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax.config import UserError
from blip3o_jax.data.shapes import draw, scene
from blip3o_jax.rl.rewards import ocr
from blip3o_jax.rl.rewards.ocr import TextLine


def lines(*texts: str) -> list[TextLine]:
    """Return lines one below the other."""
    return [TextLine(text, 0.9, (0, 20 * i, 100, 20 * i + 15)) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("abc", "acb", 2),
        ("a", "a", 0),
    ],
)
def test_levenshtein(a, b, distance):
    assert ocr.levenshtein(a, b) == ocr.levenshtein(b, a) == distance


@pytest.mark.parametrize(
    "prompt, spans",
    [
        ('a sign that says "OPEN"', ("OPEN",)),
        ('"One" above "Two words"', ("One", "Two words")),
        ("a poster \u201cNew York\u201d", ("New York",)),
        ("ein Schild \u201eOffen\u201c und \u00abouvert\u00bb", ("Offen", "ouvert")),
        ("it's \"rock'n'roll\"", ("rock'n'roll",)),
    ],
)
def test_what_stands_between_quotes(prompt, spans):
    assert ocr.quoted(prompt) == spans


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a red circle", "quotes no text"),
        ('a sign ""', "empty quotes"),
        ('signs "A" and "  "', "empty quotes"),
        ('a 5" pipe', "does not close"),
        ('a sign "\u200b\U0001f382 \u00ad"', "quotes characters that the recogniser cannot read"),
        (
            'a sign "\u041a\u0410\u0424\u0415 24"',
            "quotes '\u043a\u0430\u0444\u0435', which the recogniser has no",
        ),
    ],
)
def test_a_prompt_without_a_target_is_refused_when_it_is_loaded(prompt, message):
    reward = ocr.Ocr(lambda image_HWC: [], ocr.strict)
    with pytest.raises(UserError, match=message):
        reward.check(prompt, {})


@pytest.mark.parametrize(
    "read, target, score",
    [
        (("OPEN",), "Open", 1.0),
        (("OP", "EN"), "o pen", 1.0),
        (("xxOPENxxxxxx",), "OPEN", 1.0),  # what the strict scoring is for
        (("OPFN",), "OPEN", 0.75),
        ((), "OPEN", 0.0),
        (("something else altogether",), "OPEN", 0.0),
    ],
)
def test_reference_scoring(read, target, score):
    assert ocr.reference(lines(*read), [target]).score == score


@pytest.mark.parametrize(
    "read, target, score, distance",
    [
        (("OPEN",), "Open", 1.0, 0),
        (("OP", "EN"), "o pen", 1.0, 0),
        (("\uff2f\uff30EN",), "open", 1.0, 0),  # full-width letters
        (("xxOPENxx",), "OPEN", 0.5, 4),
        (("OPEN", "OPEN", "OPEN"), "OPEN", 1 / 3, 8),
        (("OPFN",), "OPEN", 0.75, 1),
        (("EN", "OP"), "OPEN", 0.0, 4),
        ((), "OPEN", 0.0, 4),
        (("abcdefgh",), "XY", 0.0, 8),
    ],
)
def test_strict_scoring_counts_what_is_too_much(read, target, score, distance):
    found = ocr.strict(lines(*read), [target])
    assert (found.score, found.distance, found.exact) == (
        pytest.approx(score, abs=1e-12),
        distance,
        distance == 0,
    )


def test_several_spans_stand_in_any_order_and_all_must_be_there():
    asked = ["one", "two", "six"]
    assert ocr.strict(lines("SIX", "ONE", "TWO"), asked).score == 1
    assert ocr.strict(lines("two", "one"), asked).score == pytest.approx(2 / 3)
    assert ocr.reference(lines("two", "one"), asked).score == pytest.approx(2 / 3)
    many = ["a", "b", "c", "d", "e"]
    assert ocr.strict(lines(*many), many).score == 1
    assert (
        ocr.strict(lines(*many[::-1]), many).score < 1
    )  # more than MAX_REORDERED: in the order of the prompt


def test_lines_are_read_by_rows():
    boxes = {"right": (60, 2, 90, 20), "below": (0, 30, 50, 50), "left": (0, 5, 40, 18)}
    found = ocr.in_reading_order([TextLine(text, 0.9, box) for text, box in boxes.items()])
    assert [line.text for line in found] == ["left", "right", "below"]


def test_scores_and_parts_of_a_batch():
    def read(image_HWC):
        return (
            [TextLine("OPEN", 0.8, (0, 0, 9, 9)), TextLine("xx", 0.2, (0, 20, 9, 29))]
            if image_HWC.any()
            else []
        )

    images_BHWC = np.stack([np.ones((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)])
    scores = ocr.Ocr(read, ocr.strict, min_confidence=0.5)(images_BHWC, ['"open"'] * 2, [{}] * 2)
    assert scores.total_B.dtype == np.float32
    np.testing.assert_array_equal(scores.total_B, [1, 0])
    np.testing.assert_array_equal(scores.parts["exact"], [1, 0])
    np.testing.assert_array_equal(scores.parts["distance"], [0, 4])
    np.testing.assert_allclose(scores.parts["confidence"], [0.8, 0], atol=1e-7)
    all_read = ocr.Ocr(read, ocr.strict)(images_BHWC[:1], ['"open"'], [{}])
    np.testing.assert_allclose(all_read.total_B, [4 / 6], atol=1e-7)
    np.testing.assert_allclose(all_read.parts["confidence"], [(4 * 0.8 + 2 * 0.2) / 6], atol=1e-7)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scoring": "loose"}, "scoring='loose' is not one of strict, reference"),
        ({"min_side": "big"}, "min_side='big' must be a whole number in 16 .. 4096"),
        ({"border": "nan"}, "border='nan' must be a number in 0 .. 1"),
        ({"detect": "maybe"}, "detect='maybe' is not one of true, false"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        ocr.create(**options)


def test_a_reward_that_only_checks_prompts_loads_no_model():
    program = (
        "import sys; from blip3o_jax.rl.rewards import ocr; ocr.create().check('\"A\"', {});"
        "print(sorted({'jax', 'onnxruntime', 'rapidocr'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def reward() -> ocr.Ocr:
    return ocr.create()


def written(text: str, size: int, side: int = 256) -> np.ndarray:
    """Return uint8 [side, side, 3] with the text in letters `size` pixels high in its middle."""
    image = Image.new("RGB", (side, side), (240, 236, 220))
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(image).multiline_text(
        (side / 2, side / 2), text, (30, 30, 90), font=font, anchor="mm", align="center"
    )
    return np.asarray(image)


def test_the_recogniser_reads_drawn_text(reward):
    cases = [("OPEN", 40), ("Hello World", 32), ("TOP\nSECRET", 48), ("SALE", 90), ("pay 120", 14)]
    images_BHWC = np.stack([written(text, size) for text, size in cases])
    scores = reward(images_BHWC, [f'a sign "{text}"' for text, _ in cases], [{}] * len(cases))
    np.testing.assert_array_equal(scores.parts["exact"], np.ones(len(cases)))
    np.testing.assert_array_equal(scores.total_B, np.ones(len(cases)))
    assert scores.parts["confidence"].min() > 0.8


def test_the_recogniser_does_not_find_what_is_not_there(reward):
    images_BHWC = np.stack(
        [written("OPEN", 40), written("OPEN\nPEN\nXYZ", 40), np.full((256, 256, 3), 200, np.uint8)]
    )
    scores = reward(images_BHWC, ['a "OVEN"', 'a sign "OPEN"', '"OPEN"'], [{}] * 3)
    assert not scores.parts["exact"].any()
    # One letter of four is wrong; six of ten are too many; nothing.
    np.testing.assert_allclose(scores.total_B, [3 / 4, 4 / 10, 0], atol=1e-6)


def test_the_recogniser_reads_the_words_of_the_shapes_data_set_at_their_own_size(reward):
    """Read letters of 5 x 7 dots in images of 64 pixels, as `blip3o demo` renders them."""
    scenes = [
        s for s in (scene.sample(0, index, "train") for index in range(84)) if s.word is not None
    ]
    images_BHWC = np.stack([draw.render(s, 64) for s in scenes])
    scores = reward(images_BHWC, [f'the word "{s.word.text}"' for s in scenes], [{}] * len(scenes))
    assert len(scenes) == 12 and scores.parts["exact"].sum() >= 11
