"""A scene: what is where in one image, drawn at random from (seed, split, index) and nothing else.

Positions and lengths are shares of the image's side, x to the right and y down, so that a scene has
no resolution.

Everything stands on a grid of CELLS x CELLS: a small object or a letter in the middle of a cell, a
large object in the middle of four. What is to be learned is then what goes where, in minutes, and
not how an object looks half a pixel further on. The scorer knows nothing of the grid.
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
# Light and nearly grey, so that whatever is saturated or dark is an object.
PAPERS = ((255, 255, 255), (232, 232, 232), (248, 242, 226), (228, 238, 250))
RGB = tuple[int, int, int]
# Where the centre of an object may lie, along each axis.
SPOTS = {
    "small": tuple((i + 0.5) / CELLS for i in range(CELLS)),
    "large": tuple(i / CELLS for i in range(1, CELLS)),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: centre (x, y) and side of the square it is inscribed in. The scorer's findings
    have the same fields; there shape and colour are None where they cannot be told.
    """

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
        """x0, y0, x1, y1."""
        half = self.side / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclasses.dataclass(frozen=True)
class Word:
    """A written word with its centre."""

    text: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Background:
    """kind: plain, gradient (from `paper` to `second` along `direction`), stripes or dots (of
    `second` on `paper`).
    """

    kind: str
    paper: RGB
    second: RGB
    direction: tuple[float, float]
    period: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """`asked` is the fact that its caption will ask for; `things` begin with the objects it names,
    in its order.
    """

    key: str
    category: str
    asked: Fact
    things: tuple[Thing, ...]
    word: Word | None
    background: Background


def relations(a: Thing, b: Thing) -> set[str]:
    """Which of left of, right of, above, below hold for `a` relative to `b`: GenEval's rule. A
    tenth of the two sizes is taken off each offset, and what is left must be more than half of the
    whole distance (so diagonals count as both).
    """
    dx, dy = a.x - b.x, a.y - b.y
    distance = max((dx * dx + dy * dy) ** 0.5, 1e-9)
    slack = 0.1 * (a.side + b.side)
    right, down = ((abs(d) - slack) / distance > 0.5 for d in (dx, dy))
    found = {"right of" if dx > 0 else "left of"} if right else set()
    return found | ({"below" if dy > 0 else "above"} if down else set())


def facts(scene: Scene) -> set[Fact]:
    """Every fact of every kind that is true of the scene, asked for or not."""
    if scene.word is not None:
        return {("text", scene.word.text)}
    things, shapes = scene.things, {thing.shape for thing in scene.things}
    found: set[Fact] = set()
    if len(things) == 1:
        (thing,) = things
        found |= {
            ("single", thing.size, thing.colour, thing.shape),
            ("colours", thing.shape, thing.colour),
        }
    elif len(shapes) == 1:
        found.add(("counting", str(len(things)), things[0].shape))
    for a, b in itertools.permutations(things, 2):
        if a.shape != b.shape:
            found.add(vocabulary.fact_of_two(a.shape, b.shape))
            found.add(vocabulary.fact_of_attribution((a.shape, a.colour), (b.shape, b.colour)))
            found |= {
                vocabulary.fact_of_position(a.shape, relation, b.shape)
                for relation in relations(a, b)
            }
    return found


def sample(seed: int, index: int, split: str) -> Scene:
    """Scene number `index` of a split; the categories take turns. See `vocabulary` for what is held
    out from training.
    """
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
    """Objects that make the fact true, and no others; whatever the fact leaves open is drawn at
    random.
    """
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
            return _as_read(
                _place(rng, [(*look, size) for look, size in zip(named, _sizes(rng), strict=True)])
            )
        case "position":
            pair = zip((args[0], args[2]), _sizes(rng), strict=True)
            return _place_beside(
                rng, args[1], [(shape, rng.choice(colours), size) for shape, size in pair]
            )
        case "text":
            return ()
    raise ValueError(f"unknown kind of fact: {asked}")


def _sizes(rng: random.Random) -> tuple[str, str]:
    """Of two objects, of which one at most is large: there is no room for more."""
    return rng.choice((("small", "small"), ("small", "large"), ("large", "small")))


def _place(rng: random.Random, looks: list[tuple[str, str, str]]) -> tuple[Thing, ...]:
    """Objects of the given (shape, colour, size) anywhere on the grid, apart from each other."""
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
    """Row by row from the top, each from the left: the order in which a caption names them, as
    people's do. Unordered, what stands first in an image could be either, each with its own colour,
    and which colour is whose is learned much later.
    """
    return tuple(sorted(things, key=lambda t: (int(t.box[1] * CELLS), t.box[0])))


def _place_beside(
    rng: random.Random, relation: str, looks: list[tuple[str, str, str]]
) -> tuple[Thing, ...]:
    """Two objects, the first left of (or above) the second, in a row (or column) or nearly so."""
    while True:
        a, b = things = _place(rng, looks)
        across = abs(a.y - b.y) if relation == "left of" else abs(a.x - b.x)
        if relations(a, b) == {relation} and across < 0.6 / CELLS:
            return things


def _word(rng: random.Random, text: str) -> Word:
    """A word in neighbouring cells of one row."""
    column, row = rng.randint(0, CELLS - len(text)), rng.randint(0, CELLS - 1)
    return Word(text, (column + len(text) / 2) / CELLS, (row + 0.5) / CELLS)


def word_size(text: str) -> tuple[float, float]:
    """Width and height: letters are 5 x 7 dots, one to a cell."""
    return (len(text) - 1) / CELLS + 5 * LETTER_CELL, 7 * LETTER_CELL


def _background(rng: random.Random) -> Background:
    kind = rng.choice(("plain", "plain", "gradient", "stripes", "dots"))
    paper = rng.choice(PAPERS)
    # A gradient ends a tenth darker; a pattern stays within what the eye just sees.
    shade = 0.9 if kind == "gradient" else 0.955
    second = tuple(round(c * shade) for c in paper)
    return Background(kind, paper, second, rng.choice(((1.0, 0.0), (0.0, 1.0))), 0.125)
