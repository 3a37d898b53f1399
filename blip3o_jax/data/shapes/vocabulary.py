"""Define the words of the shapes data set, and which combinations of them are held out.

Everything a caption can ask for is a *fact* about a scene: ("colours", "circle", "red") says that
it shows a red circle alone, ("two", "circle", "ring") that both are. Facts come in one kind per
category:

    kind          fact                                                       all    held out
    single        the only object has this (size, colour, shape)              62     9
    two           both of these shapes are present                            15     2
    counting      exactly this many (2-4) objects, all of this shape          18     3
    colours       the only object has this (shape, colour)                   36     5
    position      a (shape, left of | above, shape) is true                   52     7
    attribution   both of these (shape, colour) objects are present          390    56
    text          this word is written                                       124    18

The rule: of each kind's sorted list of combinations every seventh is held out, beginning with the
fourth. A training (or validation) scene contains no held-out fact of any kind; a test prompt asks
for a held-out fact of its own category, and its image contains none of another kind. Every shape,
colour, size, count, relation and letter by itself occurs in training.
"""

import itertools

Fact = tuple[str, ...]

CATEGORIES = ("single", "two", "counting", "colours", "position", "attribution", "text")
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
INK = (24, 24, 28)  # of words
# sRGB; every two of them are at least 42 apart in CIELAB.
COLOURS = {
    "red": (216, 32, 42),
    "yellow": (250, 214, 28),
    "green": (36, 158, 70),
    "blue": (28, 96, 220),
    "purple": (158, 44, 176),
    "black": INK,
}
# Width of an object as a fraction of the image's, lowest and highest; an object between the two
# ranges is neither.
SIZES = {"small": (0.26, 0.27), "large": (0.52, 0.53)}
COUNTS = (2, 3, 4)
NUMERALS = {1: "one", 2: "two", 3: "three", 4: "four"}
# Each relation with its converse: A left of B is B right of A.
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# As long as a row of the grid. Thirteen letters are few enough to be learned from a thousand images
# of words, and the words too many to be learned by heart in place of their letters.
_WORDS = """
ACE ACT AIR ALE ALL ANT APE ARC ARE ART ASH ATE CAD CAN CAP CAR CAT COD COP COT DAD DEN DIE DIN DIP
DOC DOE DON DOT EAR EAT END ERA HAD HAT HEN HER HID HIP HIS HIT HOE HOP HOT ICE ILL INN ION IRE ITS
LAD LAP LEA LED LET LID LIE LIP LIT LOT NAP NET NIL NIP NOD NOR NOT OAR OAT ODD ODE OIL OLD ONE OPT
ORE PAD PAL PAN PAR PAT PEA PEN PER PET PIE PIN PIT POD POP POT RAN RAP RAT RID RIP ROD ROE ROT SAD
SAP SAT SEA SET SHE SIN SIP SIR SIT SOD SON SPA TAN TAP TAR TEA TEN TIE TIN TIP TOE TON TOP TOT
"""
WORDS = tuple(sorted(_WORDS.split()))


def fact_of_position(a: str, relation: str, b: str) -> Fact:
    """Return the fact of a relation, the same for its converse: "a right of b" is ("position", b,
    "left of", a)."""
    return (
        ("position", a, relation, b)
        if relation in ("left of", "above")
        else ("position", b, RELATIONS[relation], a)
    )


def fact_of_attribution(one: tuple[str, str], other: tuple[str, str]) -> Fact:
    """Return the fact that `one` and `other`, each a (shape, colour), are both present, in any
    order."""
    first, second = sorted((one, other), key=lambda pair: SHAPES.index(pair[0]))
    return ("attribution", *first, *second)


def fact_of_two(a: str, b: str) -> Fact:
    """Return the fact that both shapes are present, in any order."""
    return ("two", *sorted((a, b), key=SHAPES.index))


def _hold_out(facts: list[Fact]) -> tuple[list[Fact], list[Fact]]:
    held_out = facts[3::7]
    return [fact for fact in facts if fact not in held_out], held_out


def _tables() -> tuple[dict[str, list[Fact]], dict[str, list[Fact]]]:
    """Return (facts to train on, facts held out) by kind. Singles, positions and attributions
    combine colours and pairs that are not held out, so that each category tests its own kind of new
    combination."""
    every: dict[str, list[Fact]] = {
        "two": [("two", a, b) for a, b in itertools.combinations(SHAPES, 2)],
        "counting": [("counting", str(n), shape) for n in COUNTS for shape in SHAPES],
        "colours": [("colours", shape, colour) for shape in SHAPES for colour in COLOURS],
        "text": [("text", word) for word in WORDS],
    }
    split = {kind: _hold_out(facts) for kind, facts in every.items()}
    pairs = [(a, b) for _, a, b in split["two"][0]]
    single = [(shape, colour) for _, shape, colour in split["colours"][0]]
    split["single"] = _hold_out(
        [("single", size, colour, shape) for size in SIZES for shape, colour in single]
    )
    objects = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    split["position"] = _hold_out(
        [
            ("position", a, relation, b)
            for pair in pairs
            for a, b in (pair, pair[::-1])
            for relation in ("left of", "above")
        ]
    )
    split["attribution"] = _hold_out(
        [
            ("attribution", *one, *other)
            for one, other in itertools.combinations(objects, 2)
            if (one[0], other[0]) in pairs and one[1] != other[1]
        ]
    )
    return {k: split[k][0] for k in CATEGORIES}, {k: split[k][1] for k in CATEGORIES}


TRAIN_FACTS, HELD_OUT_FACTS = _tables()
HELD_OUT = frozenset(fact for facts in HELD_OUT_FACTS.values() for fact in facts)
