"""Score an image against its prompt: GenEval's rules on the objects of `detect`, and a word reader.

- Every asked object must be there, with the asked colour and size; it meets one request only.
- Counting is exact: as many as asked and no more, and nothing else that cannot be recognised.
- A relation must hold between the two asked objects, by GenEval's margins (`scene.relations`).
- Extra objects are allowed otherwise, but an image that is mostly unrecognised blobs is wrong.
- A word must be read exactly, upper or lower case.

`ScoreResult.met` ranks wrong images by the fraction of the requirements that they meet. The
requirements of an object are its shape, and its colour and size where they are asked and the shape
is right; further ones are a relation, and each letter in its place. Mostly unrecognised blobs count
as one more requirement that is not met, and so does each surplus object where counting is exact.
"""

import dataclasses
import itertools

import numpy as np

from blip3o_jax.data.shapes.captions import Metadata, plural
from blip3o_jax.data.shapes.detect import Detection, detect
from blip3o_jax.data.shapes.scene import Scene, Thing, relations

MAX_UNRECOGNISED = 0.4  # of the area of all blobs' boxes: the fraction in unrecognised ones


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    """Hold the score of one image. `met` is 1 where the image is correct, else the fraction below 1
    of the requirements that hold; `reason` is one short sentence in plain English; `detected` lists
    the objects as dicts with shape, colour, size, centre and box (fractions of the image's side).
    """

    correct: bool
    met: float
    reason: str
    detected: tuple[Metadata, ...]


def score(image_HWC: np.ndarray, metadata: Metadata) -> ScoreResult:
    """Score a square uint8 RGB image [S, S, 3] against a prompt's metadata (see `captions`)."""
    return score_detection(detect(image_HWC), metadata)


def satisfies(scene: Scene, metadata: Metadata) -> bool:
    """Return whether a scene, by its exact description instead of its pixels, meets the prompt."""
    return score_detection(Detection(scene.things, scene.word, has_paper=True), metadata).correct


def score_detection(found: Detection, metadata: Metadata) -> ScoreResult:
    """Score detected objects and the detected word against a prompt's metadata."""
    detected = tuple(_as_dict(thing) for thing in found.things)
    if not found.has_paper:
        return ScoreResult(False, 0.0, "no light background to separate objects from", detected)
    if metadata["word"]:
        problem, met = _wrong_word(found, metadata), _letters_met(found, metadata)
    else:
        problem, met = _wrong_objects(found.things, metadata), _objects_met(found.things, metadata)
    return ScoreResult(problem is None, met, problem or "as asked", detected)


def _wrong_word(found: Detection, metadata: Metadata) -> str | None:
    wanted = f'asked the word "{metadata["word"]}"'
    if found.word is None:
        return f"{wanted}, found nothing readable"
    if found.word.text.upper() != metadata["word"].upper():
        return f'{wanted}, read "{found.word.text}"'
    return None


def _letters_met(found: Detection, metadata: Metadata) -> float:
    asked, read = metadata["word"].upper(), found.word.text.upper() if found.word else ""
    return sum(a == b for a, b in zip(asked, read, strict=False)) / max(len(asked), len(read))


def _wrong_objects(things: tuple[Thing, ...], metadata: Metadata) -> str | None:
    if not things:
        return f"asked {_names(metadata)}, found nothing"
    if _mostly_unrecognised(things):
        return f"asked {_names(metadata)}, found {_listing(things)}"
    matches = [
        [thing for thing in things if _answers(thing, asked)] for asked in metadata["objects"]
    ]
    for asked, matching in zip(metadata["objects"], matches, strict=True):
        exact = metadata["category"] == "counting"
        unknown = exact and any(thing.shape is None for thing in things)
        if len(matching) < asked["count"] or unknown or (exact and len(matching) != asked["count"]):
            return f"asked {_name(asked)}, found {_listing(things)}"
    relation = metadata["relation"]
    for chosen in itertools.product(*matches):
        if len(set(map(id, chosen))) == len(chosen) and (
            not relation or relation in relations(*chosen[:2])
        ):
            return None
    if relation:
        return f"asked {_names(metadata)}, found the {metadata['objects'][0]['shape']} elsewhere"
    return f"asked {_names(metadata)}, found {_listing(things)}"


def _objects_met(things: tuple[Thing, ...], metadata: Metadata) -> float:
    asked = metadata["objects"]
    if metadata["category"] == "counting":
        (every,) = asked
        held = sorted((_facts_met(thing, every) for thing in things), reverse=True)[
            : every["count"]
        ]
        answering = sum(_answers(thing, every) for thing in things)
        surplus = max(answering - every["count"], 0) + sum(thing.shape is None for thing in things)
        return sum(held) / (len(_asked_facts(every)) * (every["count"] + surplus))
    # All assignments of the requested objects to detected ones, None where one is missing: the best
    # assignment counts.
    choices = [[None, *(thing for thing in things if thing.shape == one["shape"])] for one in asked]
    best = 0
    for chosen in itertools.product(*choices):
        there = [id(thing) for thing in chosen if thing is not None]
        if len(set(there)) == len(there):
            pair = [thing for thing in chosen[:2] if thing is not None]
            related = (
                metadata["relation"]
                and len(pair) == 2
                and metadata["relation"] in relations(pair[0], pair[1])
            )
            best = max(best, sum(map(_facts_met, chosen, asked)) + bool(related))
    facts = sum(len(_asked_facts(one)) for one in asked) + bool(metadata["relation"])
    return best / (facts + _mostly_unrecognised(things))


def _mostly_unrecognised(things: tuple[Thing, ...]) -> bool:
    unclear = sum(thing.side**2 for thing in things if thing.shape is None)
    return unclear > MAX_UNRECOGNISED * sum(thing.side**2 for thing in things)


def _asked_facts(asked: Metadata) -> list[str]:
    return ["shape", *(name for name in ("colour", "size") if asked.get(name))]


def _facts(thing: Thing, asked: Metadata) -> list[bool]:
    return [getattr(thing, name) == asked[name] for name in _asked_facts(asked)]


def _answers(thing: Thing, asked: Metadata) -> bool:
    return all(_facts(thing, asked))


def _facts_met(thing: Thing | None, asked: Metadata) -> int:
    """Return the number of facts that hold; 0 where the shape differs, since colour and size are
    then those of another object."""
    return sum(_facts(thing, asked)) if thing and thing.shape == asked["shape"] else 0


def _names(metadata: Metadata) -> str:
    return f" {metadata['relation'] or 'and'} ".join(_name(asked) for asked in metadata["objects"])


def _name(asked: Metadata) -> str:
    name = " ".join(part for part in (asked.get("size"), asked["colour"], asked["shape"]) if part)
    return f"{asked['count']} {plural(name)}" if asked["count"] > 1 else f"a {name}"


def _listing(things: tuple[Thing, ...]) -> str:
    """Return a text such as "2 red circles, 1 unclear object"."""
    names: dict[str, int] = {}
    for thing in things:
        name = (
            f"{thing.size} {thing.colour or 'unclear-coloured'} {thing.shape}"
            if thing.shape
            else "unclear object"
        )
        names[name] = names.get(name, 0) + 1
    return ", ".join(f"{n} {plural(name) if n > 1 else name}" for name, n in names.items())


def _as_dict(thing: Thing) -> Metadata:
    centre, box = (thing.x, thing.y), thing.box
    return {
        "shape": thing.shape,
        "colour": thing.colour,
        "size": thing.size,
        "centre": centre,
        "box": box,
    }
