"""Sample edits of scenes: the instruction, the scene before and after it, and the metadata by which
the result is scored.

    recolour     make the red circle blue
    move         move the red circle to the top left
    add          add a small red circle at the top left
    remove       remove the red circle
    replace      replace the red circle with a blue star
    background   make the background cream
    word         change the word to "TEA"

Both scenes are rendered alike, so that pixels outside the edit are identical. The instruction fits
exactly one object. Metadata is a plain dict that JSON can hold:

    kind         one of KINDS
    present      [{"shape", "colour", "x", "y"}, ...]: to be found after the edit, about there
    absent       [{"x", "y"}, ...]: where nothing is to be found
    paper        None, or the name of the background's colour
    word         None, or the word to be read
    changed      [[x0, y0, x1, y1], ...]: boxes of all that may change, fractions of the side; None:
                 all except `kept`
    kept         [{"shape", "x", "y", "side"}, ...]: what stays where the background changes

Training edits begin and end at scenes without a held-out fact; test edits begin at test scenes,
which have one.
"""

import dataclasses
import random
from typing import Any

from blip3o_jax.data.shapes import places
from blip3o_jax.data.shapes.captions import Metadata
from blip3o_jax.data.shapes.scene import (
    GAP,
    PAPERS,
    SPLITS,
    Background,
    Scene,
    Thing,
    facts,
    sample,
    word_size,
)
from blip3o_jax.data.shapes.vocabulary import (
    COLOURS,
    HELD_OUT,
    HELD_OUT_FACTS,
    SHAPES,
    SIZES,
    TRAIN_FACTS,
)

KINDS = ("recolour", "move", "add", "remove", "replace", "background", "word")
PAPER_NAMES = dict(zip(("white", "grey", "cream", "pale blue"), PAPERS, strict=True))
MARGIN = 0.04  # around what changes: edges are soft, and a decoder's are softer
PHRASES = {
    "recolour": (
        "make the {it} {colour}",
        "change the colour of the {it} to {colour}",
        "paint the {it} {colour}",
    ),
    "move": (
        "move the {it} to the {place}",
        "put the {it} at the {place}",
        "shift the {it} to the {place}",
    ),
    "add": (
        "add a {new} at the {place}",
        "draw a {new} at the {place}",
        "put a {new} at the {place}",
    ),
    "remove": ("remove the {it}", "erase the {it}", "take the {it} away"),
    "replace": (
        "replace the {it} with a {new}",
        "turn the {it} into a {new}",
        "swap the {it} for a {new}",
    ),
    "background": (
        "make the background {paper}",
        "change the background to {paper}",
        "put it on a {paper} background",
    ),
    "word": (
        'change the word to "{word}"',
        'write "{word}" instead',
        'replace the word with "{word}"',
    ),
}


@dataclasses.dataclass(frozen=True)
class Edit:
    """Hold an edit: its instruction, the scenes before and after it, and its metadata."""

    key: str
    instruction: str
    before: Scene
    after: Scene
    metadata: Metadata


def sample_edit(seed: int, index: int, split: str) -> Edit:
    """Return edit number `index` of a split; the kinds take turns."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    key, kind = f"edit-{split}-{seed}-{index:06d}", KINDS[index % len(KINDS)]
    rng = random.Random(key)
    while True:
        # Every seventh scene is of a word (scene.sample takes categories in turn).
        number = rng.randrange(10**6) * 7 + (6 if kind == "word" else rng.randrange(6))
        before = sample(seed, number, split)
        made = _EDITORS[kind](rng, before, split)
        if made is None:
            continue
        after, words, metadata = made
        if split == "test" or not facts(after) & HELD_OUT:
            break
    blank: Metadata = {
        "kind": kind,
        "present": [],
        "absent": [],
        "paper": None,
        "word": None,
        "changed": [],
        "kept": [],
    }
    return Edit(key, rng.choice(PHRASES[kind]).format(**words), before, after, blank | metadata)


Made = tuple[Scene, dict[str, str], Metadata] | None  # None: this scene does not allow it


def _recolour(rng: random.Random, scene: Scene, split: str) -> Made:
    thing = _meant(rng, scene)
    if thing is None:
        return None
    colour = rng.choice([c for c in COLOURS if c != thing.colour])
    new = dataclasses.replace(thing, colour=colour)
    return (
        _swapped(scene, thing, new),
        {"it": _words(thing), "colour": colour},
        _changed([new], [], [thing, new]),
    )


def _move(rng: random.Random, scene: Scene, split: str) -> Made:
    thing = _meant(rng, scene)
    if thing is None:
        return None
    spots = {
        place: at
        for place, at in places.named(str(thing.size)).items()
        if max(abs(thing.x - at[0]), abs(thing.y - at[1])) > 0.3
    }
    place = rng.choice(sorted(spots))
    new = dataclasses.replace(thing, x=spots[place][0], y=spots[place][1])
    others = [t for t in scene.things if t is not thing]
    if not _fits(new, others) or _overlaps(thing, new):
        return None
    return (
        _swapped(scene, thing, new),
        {"it": _words(thing), "place": place},
        _changed([new], [thing], [thing, new]),
    )


def _add(rng: random.Random, scene: Scene, split: str) -> Made:
    size = rng.choice(list(SIZES))
    place, (x, y) = rng.choice(sorted(places.named(size).items()))
    new = Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), x, y, rng.uniform(*SIZES[size]))
    if not _fits(new, scene.things) or len(scene.things) > 3:
        return None
    after = dataclasses.replace(scene, things=(*scene.things, new))
    return after, {"new": f"{size} {_words(new)}", "place": place}, _changed([new], [], [new])


def _remove(rng: random.Random, scene: Scene, split: str) -> Made:
    thing = _meant(rng, scene)
    if thing is None or len(scene.things) < 2:
        return None
    after = dataclasses.replace(scene, things=tuple(t for t in scene.things if t is not thing))
    return after, {"it": _words(thing)}, _changed([], [thing], [thing])


def _replace(rng: random.Random, scene: Scene, split: str) -> Made:
    thing = _meant(rng, scene)
    if thing is None:
        return None
    shape = rng.choice([s for s in SHAPES if s != thing.shape])
    new = dataclasses.replace(thing, shape=shape, colour=rng.choice(list(COLOURS)))
    return (
        _swapped(scene, thing, new),
        {"it": _words(thing), "new": _words(new)},
        _changed([new], [], [thing, new]),
    )


def _background(rng: random.Random, scene: Scene, split: str) -> Made:
    if scene.background.kind == "gradient":  # it passes from one paper's colour to another's
        return None
    paper = rng.choice(
        [name for name, colour in PAPER_NAMES.items() if colour != scene.background.paper]
    )
    colour = PAPER_NAMES[paper]
    after = dataclasses.replace(
        scene, background=Background("plain", colour, colour, (1.0, 0.0), 0.125)
    )
    kept = [{"shape": t.shape, "x": t.x, "y": t.y, "side": t.side} for t in scene.things]
    return after, {"paper": paper}, {"paper": paper, "changed": None, "kept": kept}


def _word(rng: random.Random, scene: Scene, split: str) -> Made:
    before = scene.word
    if before is None:
        return None
    known = [fact[1] for fact in (HELD_OUT_FACTS if split == "test" else TRAIN_FACTS)["text"]]
    word = dataclasses.replace(before, text=rng.choice([w for w in known if w != before.text]))
    width, height = word_size(word.text)
    box = [word.x - width / 2, word.y - height / 2, word.x + width / 2, word.y + height / 2]
    return (
        dataclasses.replace(scene, word=word),
        {"word": word.text},
        {"word": word.text, "changed": [_wider(box)]},
    )


_EDITORS = dict(
    zip(KINDS, (_recolour, _move, _add, _remove, _replace, _background, _word), strict=True)
)


def _meant(rng: random.Random, scene: Scene) -> Thing | None:
    """Return a random object whose colour and shape no other object has; None if there is none."""
    looks = [(t.colour, t.shape) for t in scene.things]
    unique = [t for t in scene.things if looks.count((t.colour, t.shape)) == 1]
    return rng.choice(unique) if unique else None


def _words(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _swapped(scene: Scene, old: Thing, new: Thing) -> Scene:
    return dataclasses.replace(scene, things=tuple(new if t is old else t for t in scene.things))


def _fits(new: Thing, others: Any) -> bool:
    return all(
        max(abs(new.x - t.x), abs(new.y - t.y)) >= (new.side + t.side) / 2 + GAP for t in others
    )


def _overlaps(a: Thing, b: Thing) -> bool:
    return not _fits(a, [b])


def _changed(present: list[Thing], absent: list[Thing], boxes: list[Thing]) -> Metadata:
    return {
        "present": [{"shape": t.shape, "colour": t.colour, "x": t.x, "y": t.y} for t in present],
        "absent": [{"x": t.x, "y": t.y} for t in absent],
        "changed": [_wider(t.box) for t in boxes],
    }


def _wider(box: Any) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0 - MARGIN, y0 - MARGIN, x1 + MARGIN, y1 + MARGIN]


def prompts(split: str, n: int, seed: int = 0) -> list[Metadata]:
    """Return the first `n` edits of a split for evaluation: {key, caption, category,
    **metadata}."""
    edits = [sample_edit(seed, index, split) for index in range(n)]
    return [
        {"key": e.key, "caption": e.instruction, "category": e.metadata["kind"], **e.metadata}
        for e in edits
    ]
