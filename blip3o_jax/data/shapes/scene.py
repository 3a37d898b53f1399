"""Sample scenes: the objects of one image and their places, a function of (seed, split, index)
alone.

Positions and lengths are fractions of the image's side, x to the right and y down, so that a
scene has no resolution.

Everything stands on a grid of CELLS x CELLS: a small object or a letter in the middle of a cell, a
large object in the middle of four. A model then learns in minutes which objects go
where, without learning how an object looks half a pixel further on. The scorer does not use the
grid.
"""

import dataclasses
import itertools
import random

from blip3o_jax.data.shapes import vocabulary
from blip3o_jax.data.shapes.vocabulary import (
    CATEGORIES,
    COLOURS,
    HELD_OUT,
    HELD_OUT_FACTS,
    SIZES,
    TRAIN_FACTS,
    Fact,
)

SPLITS = ("train", "validation", "test")
CELLS = 3
GAP = 0.03  # between the boxes of two objects
LETTER_CELL = 1 / 24  # side of one dot of a letter of 5 x 7 dots
# Light and nearly grey, so that saturated or dark pixels belong to an object.
PAPERS = ((255, 255, 255), (232, 232, 232), (248, 242, 226), (228, 238, 250))
RGB = tuple[int, int, int]
# Where the centre of an object may lie, along each axis.
SPOTS = {
    "small": tuple((i + 0.5) / CELLS for i in range(CELLS)),
    "large": tuple(i / CELLS for i in range(1, CELLS)),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """Describe one object: its centre (x, y) and the side of the square in which it is inscribed.
    The detector returns the same class; there, shape and colour are None where they are not
    recognised."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    side: float

    @property
    def size(self) -> str | None:
        middle = (SIZES["small"][1] + SIZES["large"][0]) / 2
        if not 0.6 * SIZES["small"][0] < self.side < 1.5 * SIZES["large"][1]:
            return None
        return "small" if self.side < middle else "large"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Return the corners x0, y0, x1, y1."""
        half = self.side / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


def look(thing: Thing) -> tuple[str, str]:
    """Return shape and colour of a scene's object, which has both."""
    assert thing.shape is not None and thing.colour is not None
    return thing.shape, thing.colour


@dataclasses.dataclass(frozen=True)
class Word:
    """Describe a written word by its text and its centre."""

    text: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Background:
    """Describe a background by its kind: plain, gradient (from `paper` to `second` along
    `direction`), stripes or dots (of `second` on `paper`)."""

    kind: str
    paper: RGB
    second: RGB
    direction: tuple[float, float]
    period: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """Describe one image. `asked` is the fact that its caption asks for; `things` begin with the
    objects that the fact names, in its order."""

    key: str
    category: str
    asked: Fact
    things: tuple[Thing, ...]
    word: Word | None
    background: Background


def relations(a: Thing, b: Thing) -> set[str]:
    """Return which of left of, right of, above, below hold for `a` relative to `b`, by GenEval's
    rule: a tenth of the two sizes is subtracted from each offset, and the rest must exceed half of
    the distance (so a diagonal satisfies both axes)."""
    dx, dy = a.x - b.x, a.y - b.y
    distance = max((dx * dx + dy * dy) ** 0.5, 1e-9)
    slack = 0.1 * (a.side + b.side)
    right, down = ((abs(d) - slack) / distance > 0.5 for d in (dx, dy))
    found = {"right of" if dx > 0 else "left of"} if right else set()
    return found | ({"below" if dy > 0 else "above"} if down else set())


def facts(scene: Scene) -> set[Fact]:
    """Return all facts of all kinds that are true of the scene, asked for or not."""
    if scene.word is not None:
        return {("text", scene.word.text)}
    things, shapes = scene.things, {thing.shape for thing in scene.things}
    found: set[Fact] = set()
    if len(things) == 1:
        (thing,) = things
        shape, colour = look(thing)
        found |= {("single", str(thing.size), colour, shape), ("colours", shape, colour)}
    elif len(shapes) == 1:
        found.add(("counting", str(len(things)), look(things[0])[0]))
    for a, b in itertools.permutations(things, 2):
        if a.shape != b.shape:
            look_a = look(a)
            look_b = look(b)
            found.add(vocabulary.fact_of_two(look_a[0], look_b[0]))
            found.add(vocabulary.fact_of_attribution(look_a, look_b))
            found |= {
                vocabulary.fact_of_position(look_a[0], relation, look_b[0])
                for relation in relations(a, b)
            }
    return found


def sample(seed: int, index: int, split: str) -> Scene:
    """Return scene number `index` of a split; the categories take turns. See `vocabulary` for the
    combinations that are held out from training."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    key = f"{split}-{seed}-{index:06d}"
    rng = random.Random(key)
    category = CATEGORIES[index % len(CATEGORIES)]
    asked = rng.choice((HELD_OUT_FACTS if split == "test" else TRAIN_FACTS)[category])
    background = _background(rng)
    while True:
        word = _word(rng, asked[1]) if category == "text" else None
        scene = Scene(key, category, asked, _things(rng, asked), word, background)
        if all(split == "test" and fact[0] == category for fact in facts(scene) & HELD_OUT):
            return scene


def _things(rng: random.Random, asked: Fact) -> tuple[Thing, ...]:
    """Return objects that make the fact true, and no others; attributes that the fact leaves open
    are random."""
    kind, *args = asked
    colours = list(COLOURS)
    match kind:
        case "single":
            size, colour, shape = args
            return _place(rng, [(shape, colour, size)])
        case "colours":
            return _place(rng, [(args[0], args[1], rng.choice(list(SIZES)))])
        case "counting":
            return _place(rng, [(args[1], rng.choice(colours), "small")] * int(args[0]))
        case "two":
            shapes = rng.sample(args, 2)
            looks = [
                (shape, rng.choice(colours), size)
                for shape, size in zip(shapes, _sizes(rng), strict=True)
            ]
            return _as_read(_place(rng, looks))
        case "attribution":
            named = rng.sample([args[:2], args[2:]], 2)
            pair = zip(named, _sizes(rng), strict=True)
            return _as_read(_place(rng, [(shape, colour, size) for (shape, colour), size in pair]))
        case "position":
            shapes = [args[0], args[2]]
            looks = [
                (shape, rng.choice(colours), size)
                for shape, size in zip(shapes, _sizes(rng), strict=True)
            ]
            return _place_pair(rng, args[1], looks)
        case "text":
            return ()
    raise ValueError(f"unknown kind of fact: {asked}")


def _sizes(rng: random.Random) -> tuple[str, str]:
    """Return sizes of two objects, at most one of them large: two large ones do not fit."""
    return rng.choice((("small", "small"), ("small", "large"), ("large", "small")))


def _place(rng: random.Random, looks: list[tuple[str, str, str]]) -> tuple[Thing, ...]:
    """Place objects of the given (shape, colour, size) at random on the grid, with a gap between
    them."""
    sides = [rng.uniform(*SIZES[size]) for _, _, size in looks]
    things: list[Thing] = []
    for attempt in itertools.count(1):
        (shape, colour, size), side = looks[len(things)], sides[len(things)]
        x, y = rng.choice(SPOTS[size]), rng.choice(SPOTS[size])
        if all(max(abs(x - t.x), abs(y - t.y)) >= (side + t.side) / 2 + GAP for t in things):
            things.append(Thing(shape, colour, x, y, side))
        if len(things) == len(looks):
            break
        if attempt % 40 == 0:
            things = []  # the first ones may leave no room for the rest
    return tuple(things)


def _as_read(things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    """Sort objects row by row from the top, each row from the left: the order in which a caption
    names them, as people's do. Without an order the first object of a caption could be any in the
    image, each with its own colour, and a model learns the pairing of colours and objects much
    later."""
    return tuple(sorted(things, key=lambda t: (int(t.box[1] * CELLS), t.box[0])))


def _place_pair(
    rng: random.Random, relation: str, looks: list[tuple[str, str, str]]
) -> tuple[Thing, ...]:
    """Place two objects, the first left of (or above) the second, nearly in one row (or column)."""
    while True:
        a, b = things = _place(rng, looks)
        across = abs(a.y - b.y) if relation == "left of" else abs(a.x - b.x)
        if relations(a, b) == {relation} and across < 0.6 / CELLS:
            return things


def _word(rng: random.Random, text: str) -> Word:
    """Place a word at random in neighbouring cells of one row."""
    column, row = rng.randint(0, CELLS - len(text)), rng.randint(0, CELLS - 1)
    return Word(text, (column + len(text) / 2) / CELLS, (row + 0.5) / CELLS)


def word_size(text: str) -> tuple[float, float]:
    """Return the width and height of a word: each letter has 5 x 7 dots in one cell."""
    return (len(text) - 1) / CELLS + 5 * LETTER_CELL, 7 * LETTER_CELL


def _background(rng: random.Random) -> Background:
    kind = rng.choice(("plain", "plain", "gradient", "stripes", "dots"))
    paper = rng.choice(PAPERS)
    # A gradient ends a tenth darker; a pattern stays within what the eye just sees.
    shade = 0.9 if kind == "gradient" else 0.955
    red, green, blue = (round(c * shade) for c in paper)
    return Background(kind, paper, (red, green, blue), rng.choice(((1.0, 0.0), (0.0, 1.0))), 0.125)
