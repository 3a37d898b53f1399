"""Describe scenes in words: captions from many templates, and metadata of what a caption asks for.

Metadata is a plain dict that JSON can hold:

    category   one of `vocabulary.CATEGORIES`
    objects    [{"shape", "colour" | None, "size" | None, "count"}, ...], none for text
    relation   None, or of the first object to the second: left of, right of, above, below
    word       None, or the word to be written
"""

import random
from typing import Any

from blip3o_jax.data.shapes.scene import Scene, sample
from blip3o_jax.data.shapes.vocabulary import NUMERALS, RELATIONS

Metadata = dict[str, Any]

# Placeholders bring their article: {a} is "a red circle", {n} "three stars", {bare} "red circle".
TEMPLATES: dict[str, tuple[str, ...]] = {
    "single": (
        "{a}",
        "a picture of {a}",
        "there is {a} in the image",
        "an image with {a}",
        "{a} on a light background",
        "just {a} and nothing else",
        "one {bare}",
    ),
    "two": (
        "{a} and {b}",
        "a picture of {a} and {b}",
        "{a} together with {b}",
        "an image with {a} and {b}",
        "there is {a} and there is {b}",
        "two objects: {a} and {b}",
        "{a} next to {b}",
    ),
    "counting": (
        "{n}",
        "a picture of {n}",
        "there are {n}",
        "an image with {n}",
        "{n} on a light background",
        "exactly {n}",
        "a group of {n}",
    ),
    "colours": (
        "{a}",
        "a picture of {a}",
        "there is {a} in the image",
        "an image with {a}",
        "a {shape} that is {colour}",
        "a {shape} in {colour}",
        "one {bare}",
    ),
    "position": (
        "{a} {relation} {b}",
        "a picture of {a} {relation} {b}",
        "there is {a} {relation} {b}",
        "{a} is {relation} {b}",
        "an image with {a} {relation} {b}",
        "{a} placed {relation} {b}",
    ),
    "attribution": (
        "{a} and {b}",
        "a picture of {a} and {b}",
        "{a} together with {b}",
        "an image with {a} and {b}",
        "there is {a} and there is {b}",
        "two objects: {a} and {b}",
    ),
    "text": (
        'the word "{word}"',
        '"{word}"',
        'a sign that says "{word}"',
        'an image with the word "{word}"',
        'the text "{word}"',
        'the letters "{word}"',
        'a picture that reads "{word}"',
    ),
}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def describe(scene: Scene) -> tuple[str, Metadata]:
    """Return a caption of the scene and its metadata; the same scene always gets the same ones."""
    rng = random.Random(f"caption-{scene.key}")
    metadata = _metadata(scene, rng)
    template = rng.choice(TEMPLATES[scene.category])
    words: dict[str, str] = {}
    if scene.category == "text":
        words = {"word": metadata["word"]}
    elif scene.category == "counting":
        (asked,) = metadata["objects"]
        words = {"n": f"{NUMERALS[asked['count']]} {plural(_name(asked))}"}
    else:
        names = [_name(asked) for asked in metadata["objects"]]
        words = {"a": f"a {names[0]}", "bare": names[0], "b": f"a {names[-1]}"}
        words |= {key: metadata["objects"][0][key] for key in ("shape", "colour")}
        if metadata["relation"]:
            words["relation"] = rng.choice(RELATION_PHRASES[metadata["relation"]])
    return template.format(**words), metadata


def _metadata(scene: Scene, rng: random.Random) -> Metadata:
    category = scene.category
    shown = scene.things[:1] if category == "counting" else scene.things
    # Half of the training captions describe everything, as long captions of photographs do; a test
    # prompt only what it tests.
    full = not scene.key.startswith("test") and rng.random() < 0.5
    objects = [
        {
            "shape": thing.shape,
            "colour": thing.colour
            if full or category in ("single", "colours", "attribution")
            else None,
            "size": thing.size
            if category == "single" or (full and category != "colours")
            else None,
            "count": len(scene.things) if category == "counting" else 1,
        }
        for thing in shown
    ]
    relation = scene.asked[2] if category == "position" else None
    if relation and rng.random() < 0.5:
        objects, relation = objects[::-1], RELATIONS[relation]
    word = scene.word.text if scene.word else None
    return {"category": category, "objects": objects, "relation": relation, "word": word}


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def _name(asked: Metadata) -> str:
    return " ".join(part for part in (asked["size"], asked["colour"], asked["shape"]) if part)


def prompts(split: str, n: int, seed: int = 0) -> list[Metadata]:
    """Return the first `n` prompts of a split, the seven categories in turn: {key, caption,
    **metadata}. Those of "test" ask for combinations that are held out from the other splits."""
    found = []
    for index in range(n):
        scene = sample(seed, index, split)
        caption, metadata = describe(scene)
        found.append({"key": scene.key, "caption": caption, **metadata})
    return found
