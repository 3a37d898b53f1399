import collections

import pytest

from blip3o_jax.data.shapes import captions, scene, scorer, vocabulary
from blip3o_jax.data.shapes.scene import Thing, relations

COUNT = 4_200


@pytest.fixture(scope="module")
def train() -> list[scene.Scene]:
    return [scene.sample(0, index, "train") for index in range(COUNT)]


@pytest.fixture(scope="module")
def test() -> list[scene.Scene]:
    return [scene.sample(0, index, "test") for index in range(700)]


def test_tables_hold_out_about_an_eighth() -> None:
    sizes = {
        kind: (len(vocabulary.TRAIN_FACTS[kind]), len(facts))
        for kind, facts in vocabulary.HELD_OUT_FACTS.items()
    }
    assert sizes == {
        "single": (53, 9),
        "two": (13, 2),
        "counting": (15, 3),
        "colours": (31, 5),
        "position": (45, 7),
        "attribution": (334, 56),
        "text": (106, 18),
    }
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS)


def test_train_and_validation_scenes_contain_no_held_out_fact(train: list[scene.Scene]) -> None:
    validation = [scene.sample(0, index, "validation") for index in range(700)]
    for drawn in train + validation:
        assert not scene.facts(drawn) & vocabulary.HELD_OUT, drawn.key


def test_no_training_scene_satisfies_a_held_out_prompt(
    train: list[scene.Scene], test: list[scene.Scene]
) -> None:
    """Check it by the scorer's rules instead of the facts. "A small red cross" alone in the image
    is held out in the categories single and colours, so scenes of several objects do not count
    there."""
    prompts = {
        repr(metadata): metadata for metadata in (captions.describe(drawn)[1] for drawn in test)
    }
    for metadata in list(prompts.values())[:150]:
        for drawn in train[:1400]:
            if metadata["category"] not in ("single", "colours") or len(drawn.things) == 1:
                assert not scorer.satisfies(drawn, metadata), (drawn, metadata)


def test_test_scenes_show_the_held_out_fact_of_their_own_kind_only(test: list[scene.Scene]) -> None:
    for drawn in test:
        held_out = scene.facts(drawn) & vocabulary.HELD_OUT
        assert drawn.asked in held_out
        assert {fact[0] for fact in held_out} == {drawn.category}
    assert {drawn.asked for drawn in test if drawn.category != "attribution"} == {
        fact for fact in vocabulary.HELD_OUT if fact[0] != "attribution"
    }


def test_training_shows_every_word_by_itself(train: list[scene.Scene]) -> None:
    seen = collections.Counter(
        part for drawn in train for fact in scene.facts(drawn) for part in (fact[0], *fact)
    )
    relations_asked = collections.Counter(
        captions.describe(drawn)[1]["relation"] for drawn in train
    )
    letters = collections.Counter("".join(drawn.word.text for drawn in train if drawn.word))
    counts = [str(count) for count in vocabulary.COUNTS]
    for part in (
        *vocabulary.CATEGORIES,
        *vocabulary.SHAPES,
        *vocabulary.COLOURS,
        *vocabulary.SIZES,
        *counts,
    ):
        assert seen[part] >= 50, part
    assert all(relations_asked[relation] >= 50 for relation in vocabulary.RELATIONS)
    assert set(letters) == set("".join(vocabulary.WORDS))
    assert min(letters.values()) >= 15
    assert {len(drawn.things) for drawn in train} == {0, 1, 2, 3, 4}
    assert {drawn.background.kind for drawn in train} == {"plain", "gradient", "stripes", "dots"}


def test_objects_keep_apart_and_inside(train: list[scene.Scene]) -> None:
    for drawn in train:
        for i, a in enumerate(drawn.things):
            assert min(a.box) >= 0 and max(a.box) <= 1
            assert a.x in scene.SPOTS[a.size] and a.y in scene.SPOTS[a.size]
            for b in drawn.things[:i]:
                assert (
                    max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.side + b.side) / 2 + scene.GAP - 1e-9
                )


def test_two_objects_are_named_in_reading_order(train: list[scene.Scene]) -> None:
    """Order by the first cell of the grid that each covers, the cells counted row by row."""

    def first_cell(thing: scene.Thing) -> int:
        column, row = (
            int((centre - thing.side / 2) * scene.CELLS) for centre in (thing.x, thing.y)
        )
        return row * scene.CELLS + column

    pairs = [drawn.things for drawn in train if drawn.category in ("two", "attribution")]
    assert len(pairs) > 500
    assert all(first_cell(a) < first_cell(b) for a, b in pairs)
    # Nothing else of them is settled by it: either may be the large one, and any shape may come
    # first.
    assert {(a.size, b.size) for a, b in pairs} == {
        ("small", "small"),
        ("small", "large"),
        ("large", "small"),
    }
    assert {a.shape for a, _ in pairs} == {b.shape for _, b in pairs} == set(vocabulary.SHAPES)


def test_same_arguments_same_scene() -> None:
    assert scene.sample(3, 17, "train") == scene.sample(3, 17, "train")
    assert scene.sample(3, 17, "train") != scene.sample(4, 17, "train")
    assert scene.sample(3, 17, "train") != scene.sample(3, 17, "validation")
    with pytest.raises(ValueError, match="split='dev' is not one of train, validation, test"):
        scene.sample(0, 0, "dev")


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-0.4, 0.0, {"left of"}),
        (0.4, 0.1, {"right of"}),
        (0.05, 0.4, {"below"}),
        (-0.3, -0.3, {"left of", "above"}),
        (0.05, 0.0, set()),  # within a tenth of both sizes
        (0.4, 0.2, {"right of"}),  # (0.2 - 0.06) / 0.447 is less than a half
    ],
)
def test_relations(dx: float, dy: float, expected: set[str]) -> None:
    a, b = Thing("circle", "red", 0.5 + dx, 0.5 + dy, 0.3), Thing("square", "blue", 0.5, 0.5, 0.3)
    assert relations(a, b) == expected
    assert relations(b, a) == {vocabulary.RELATIONS[relation] for relation in expected}
