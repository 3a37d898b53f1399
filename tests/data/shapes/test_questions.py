"""Check that questions have the answers of their scenes, and that no constant answers them."""

import collections

import pytest

from blip3o_jax.data.shapes import places
from blip3o_jax.data.shapes.questions import KINDS, prompts, right, sample_question
from blip3o_jax.data.shapes.scene import facts
from blip3o_jax.data.shapes.vocabulary import HELD_OUT, NUMERALS, SHAPES


@pytest.fixture(scope="module")
def asked():
    return [sample_question(1, index, split) for split in ("train", "test") for index in range(800)]


def test_answers_are_true(asked):
    for q in asked:
        shape = next((s for s in SHAPES if s in q.question), None)
        same = [t for t in q.scene.things if t.shape == shape]
        match q.kind:
            case "word":
                assert q.answer == q.scene.word.text
            case "count":
                assert q.answer == NUMERALS[len(same) if shape else len(q.scene.things)]
            case "colour":
                assert [t.colour for t in same] == [q.answer]
            case "where":
                assert [places.of(t) for t in same] == [q.answer]


def test_the_most_frequent_answer_is_a_poor_one(asked):
    for kind in KINDS:
        counts = collections.Counter(q.answer for q in asked if q.kind == kind)
        assert counts.most_common(1)[0][1] < 0.45 * counts.total(), (kind, counts)


def test_training_knows_nothing_of_what_is_held_out(asked):
    for q in asked:
        assert bool(facts(q.scene) & HELD_OUT) == q.key.startswith("question-test")


def test_right_is_the_same_words():
    assert (
        right(" Top left ", "top left")
        and right("tea", "TEA")
        and not right("top", "top left")
        and not right("", "one")
    )


def test_prompts():
    (first, second) = prompts("test", 2, seed=5)
    question = sample_question(5, 0, "test")
    assert first == {
        "key": question.key,
        "caption": question.question,
        "category": "colour",
        "answer": question.answer,
    }
    assert second["category"] == "count"
    with pytest.raises(ValueError, match="split='x'"):
        sample_question(0, 0, "x")
