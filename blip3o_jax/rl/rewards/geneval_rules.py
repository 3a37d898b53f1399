"""Apply the rules of GenEval (Ghosh et al., arXiv 2310.11513; github.com/djghosh13/geneval) to the
objects found in an image.

A prompt's metadata, a line of the official file:

    tag        single_object, two_object, counting, colors, position or color_attr
    include    [{"class", "count", "color"?, "position"?: [relation, index of an earlier clause]},
               ...]: all must hold
    exclude    [{"class", "count"}, ...]: there must be fewer of the class

1. Objects of a class are taken by confidence, the surest `count` of them for a clause; further ones
   are an error only where `exclude` forbids them. Clauses are independent of each other: one object
   can meet several.
2. All objects of a clause must have its colour.
3. All objects of a clause must be in its relation to all objects of the named clause, which must
   itself be met. A tenth of both boxes' sizes is subtracted from the offset of the centres along
   each axis; the rest must exceed half of the distance.

The fraction that is met, for a dense reward, is the mean over all requirements: objects found of
those asked, the same of the right colour, pairs in the right relation, and of an `exclude` how
little it is exceeded (times the fraction of asked objects that are there: an empty image is no step
towards "not five"). It is 1 exactly where the official result is "correct".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.config.errors import not_a_choice

RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MARGIN = 0.1  # of both sizes, taken off an offset
Metadata = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """Describe an object found in an image. `box`: x0, y0, x1, y1 in pixels; `mask_HW`: bool, the
    pixels of the object; `colour`: where the detector itself names it."""

    name: str
    box: tuple[float, float, float, float]
    confidence: float = 1.0
    mask_HW: np.ndarray | None = None
    colour: str | None = None


@dataclasses.dataclass(frozen=True)
class RuleResult:
    """Hold the result of the rules. `met`: fraction of the requirements in [0, 1]. `reason`: the
    first requirement that is not met, in plain words."""

    correct: bool
    met: float
    reason: str


def keep(found: Sequence[Found], threshold: float, max_count: int) -> dict[str, list[Found]]:
    """Return the objects above the threshold by class, those of the highest confidence first, at
    most `max_count` of a class.
    """
    kept: dict[str, list[Found]] = {}
    for thing in sorted(found, key=lambda thing: -thing.confidence):
        if thing.confidence > threshold and len(kept.setdefault(thing.name, [])) < max_count:
            kept[thing.name].append(thing)
    return kept


def apply_rules(
    objects: Mapping[str, Sequence[Found]],
    metadata: Metadata,
    colours_of: Callable[[Sequence[Found]], Sequence[str | None]],
) -> RuleResult:
    """Apply the rules to `objects`, as `keep` returns them. `colours_of` returns the colours of
    objects of one class."""
    taken: list[Sequence[Found]] = []
    met: list[bool] = []
    fractions: list[float] = []
    there: list[float] = []
    reasons: list[str] = []
    for asked in metadata.get("include", ()):
        found = objects.get(asked["class"], ())[: asked["count"]]
        there.append(len(found) / asked["count"])
        wrong = (
            []
            if there[-1] == 1
            else [f"asked {asked['count']} {asked['class']}, found {len(found)}"]
        )
        if "color" in asked:
            colours = list(colours_of(found)) if found else []
            fractions.append(colours.count(asked["color"]) / asked["count"])
            if fractions[-1] < 1:
                wrong.append(
                    f"asked {asked['color']} {asked['class']}, found "
                    f"{', '.join(map(str, colours)) or 'none'}"
                )
        if "position" in asked:
            relation, target = asked["position"]
            complete = there[-1] == there[target] == 1
            fractions.append(_standing(found, relation, taken[target]) if complete else 0.0)
            if fractions[-1] < 1 or not met[target]:
                wrong.append(
                    f"{asked['class']} is not {relation} the {metadata['include'][target]['class']}"
                )
        taken.append(found)
        met.append(not wrong)
        reasons += wrong
    for refused in metadata.get("exclude", ()):
        count, limit = len(objects.get(refused["class"], ())), refused["count"]
        fractions.append(
            float(np.mean(there or [1])) * max(0.0, 1 - max(0, count - limit + 1) / limit)
        )
        if count >= limit:
            reasons.append(f"asked fewer than {limit} {refused['class']}, found {count}")
    return RuleResult(
        not reasons, float(np.mean(there + fractions)), "; ".join(reasons) or "as asked"
    )


def _standing(found: Sequence[Found], relation: str, targets: Sequence[Found]) -> float:
    """Return the fraction of the pairs that stand in the relation."""
    return float(np.mean([relation in relations(a.box, b.box) for a in found for b in targets]))


def relations(box_a: Sequence[float], box_b: Sequence[float]) -> set[str]:
    """Return the relations of the first box to the second."""
    a, b = np.reshape(box_a, (2, 2)), np.reshape(box_b, (2, 2))
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    left = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if np.all(np.abs(left) < 1e-3):
        return set()
    dx, dy = left / np.linalg.norm(offset)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in held.items() if holds}


def check_metadata(metadata: Metadata, classes: Sequence[str], colours: Sequence[str]) -> None:
    """Raise UserError if these rules cannot score the prompt with a detector of `classes` and
    `colours`."""
    _require(
        isinstance(metadata.get("tag"), str),
        "has no 'tag'; take the lines of an official GenEval file",
    )
    _require(bool(metadata.get("include")), "has no 'include': there is no object to score")
    for group in ("include", "exclude"):
        clauses = metadata.get(group, [])
        _require(
            isinstance(clauses, list) and all(isinstance(c, dict) for c in clauses),
            f"{group} must be a list of objects",
        )
        for index, clause in enumerate(clauses):
            where, count = f"{group}[{index}]", clause.get("count")
            _require(
                clause.get("class") in classes,
                f"{where}: the detector has no class {clause.get('class')!r}",
            )
            _require(
                type(count) is int and count > 0,
                f"{where}: count={count!r} must be a whole number above 0",
            )
            if group == "include":
                _check_colour_and_position(clause, where, index, colours)


def _check_colour_and_position(
    clause: Metadata, where: str, index: int, colours: Sequence[str]
) -> None:
    colour = clause.get("color", colours[0])
    _require(colour in colours, f"{where}: color={colour!r} {not_a_choice(colour, colours)}")
    if "position" in clause:
        position = clause["position"]
        two = isinstance(position, list | tuple) and len(position) == 2
        right = (
            two
            and position[0] in RELATIONS
            and type(position[1]) is int
            and 0 <= position[1] < index
        )
        _require(
            right,
            f"{where}: position={position!r} must be [{' | '.join(RELATIONS)}, index of an earlier "
            "clause]",
        )


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UserError(f"reward geneval: the prompt's metadata {problem}")
