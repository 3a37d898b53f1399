"""Sample questions about scenes, with their answers in words.

    colour   what colour is the star?                            red, ... (one object has the shape)
    count    how many circles are there?, how many objects ...   one, two, three, four
    where    where is the star?                                  top left, centre, ... (places.py)
    word     what does it say?                                   the word

An answer is right if it has the same words in any case. Answers of a kind are about as
frequent as each other, so the most frequent one is a poor guess.
"""

import dataclasses
import random

from blip3o_jax.data.shapes import places
from blip3o_jax.data.shapes.captions import Metadata, plural
from blip3o_jax.data.shapes.scene import SPLITS, Scene, look, sample
from blip3o_jax.data.shapes.vocabulary import CATEGORIES, NUMERALS

KINDS = ("colour", "count", "where", "word")
PHRASES = {
    "colour": (
        "what colour is the {shape}?",
        "which colour does the {shape} have?",
        "what is the colour of the {shape}?",
    ),
    "count": (
        "how many {many} are there?",
        "how many {many} do you see?",
        "what is the number of {many}?",
    ),
    "where": (
        "where is the {shape}?",
        "in which place is the {shape}?",
        "where do you see the {shape}?",
    ),
    "word": ("what does it say?", "which word is written?", "read the word"),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """Hold a question about a scene, with its answer."""

    key: str
    kind: str
    question: str
    answer: str
    scene: Scene


def sample_question(seed: int, index: int, split: str) -> Question:
    """Return question number `index` of a split; the kinds take turns."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    key, kind = f"question-{split}-{seed}-{index:06d}", KINDS[index % len(KINDS)]
    rng = random.Random(key)
    while True:
        category = rng.choice(
            {"word": ("text",), "count": ("counting", "counting", "single", "two")}.get(
                kind, CATEGORIES[:-1]
            )
        )
        scene = sample(
            seed, rng.randrange(10**6) * len(CATEGORIES) + CATEGORIES.index(category), split
        )
        asked = _ask(rng, scene, kind)
        if asked is not None:
            words, answer = asked
            return Question(key, kind, rng.choice(PHRASES[kind]).format(**words), answer, scene)


def _ask(rng: random.Random, scene: Scene, kind: str) -> tuple[dict[str, str], str] | None:
    if scene.word is not None:
        return {}, scene.word.text
    shapes = [look(t)[0] for t in scene.things]
    if kind == "count":
        shape = rng.choice(shapes)
        if len(set(shapes)) > 1 and rng.random() < 0.5:
            return {"many": "objects"}, NUMERALS[len(shapes)]
        return {"many": plural(shape)}, NUMERALS[shapes.count(shape)]
    unique = [t for t in scene.things if shapes.count(look(t)[0]) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    shape, colour = look(thing)
    return {"shape": shape}, colour if kind == "colour" else places.of(thing)


def right(given: str, answer: str) -> bool:
    """Return whether an answer has the right words, in any case."""
    return given.strip().lower() == answer.lower()


def prompts(split: str, n: int, seed: int = 0) -> list[Metadata]:
    """Return the first `n` questions of a split for evaluation: {key, caption, category, answer};
    the caption is the question."""
    asked = [sample_question(seed, index, split) for index in range(n)]
    return [
        {"key": q.key, "caption": q.question, "category": q.kind, "answer": q.answer} for q in asked
    ]
