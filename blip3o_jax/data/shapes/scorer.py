"""Does an image show what its prompt asks for? The rules of GenEval on the objects that `detect` finds, and a word reader.

- Every asked object must be there, with the asked colour and size; an object answers for one request only.
- Counting is exact: as many as asked and no more, and nothing else that cannot be recognised.
- A relation must hold between the two asked objects, by GenEval's margins (`scene.relations`).
- Extra objects are allowed otherwise, but an image that is mostly a mess (unrecognised blobs) is wrong.
- A word must be read exactly, upper or lower case.
"""

import dataclasses
import itertools

import numpy as np

from blip3o_jax.data.shapes.captions import Metadata, plural
from blip3o_jax.data.shapes.detect import Detection, detect
from blip3o_jax.data.shapes.scene import Scene, Thing, relations

MESS = 0.4  # share of the area of all blobs' boxes that may lie in unrecognised ones


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`reason` is one short sentence in plain English; `detected` what was found, as dicts with shape, colour, size, centre
    and box (shares of the image's side)."""

    correct: bool
    reason: str
    detected: tuple[Metadata, ...]


def score(image_HWC: np.ndarray, metadata: Metadata) -> Verdict:
    """Judge a square uint8 RGB image [S, S, 3] against a prompt's metadata (see `captions`)."""
    return judge(detect(image_HWC), metadata)


def satisfies(scene: Scene, metadata: Metadata) -> bool:
    """The same rules on a scene's exact truth instead of pixels."""
    return judge(Detection(scene.things, scene.word, has_paper=True), metadata).correct


def judge(found: Detection, metadata: Metadata) -> Verdict:
    detected = tuple(_as_dict(thing) for thing in found.things)
    if not found.has_paper:
        return Verdict(False, "no light background to tell objects from", detected)
    problem = _wrong_word(found, metadata) if metadata["word"] else _wrong_objects(found.things, metadata)
    return Verdict(problem is None, problem or "as asked", detected)


def _wrong_word(found: Detection, metadata: Metadata) -> str | None:
    wanted = f'asked the word "{metadata["word"]}"'
    if found.word is None:
        return f"{wanted}, found nothing readable"
    if found.word.text.upper() != metadata["word"].upper():
        return f'{wanted}, read "{found.word.text}"'
    return None


def _wrong_objects(things: tuple[Thing, ...], metadata: Metadata) -> str | None:
    if not things:
        return f"asked {_names(metadata)}, found nothing"
    unclear = sum(thing.side**2 for thing in things if thing.shape is None)
    if unclear > MESS * sum(thing.side**2 for thing in things):
        return f"asked {_names(metadata)}, found {_listing(things)}"
    matches = [[thing for thing in things if _answers(thing, asked)] for asked in metadata["objects"]]
    for asked, matching in zip(metadata["objects"], matches, strict=True):
        exact = metadata["category"] == "counting"
        unknown = exact and any(thing.shape is None for thing in things)
        if len(matching) < asked["count"] or unknown or (exact and len(matching) != asked["count"]):
            return f"asked {_name(asked)}, found {_listing(things)}"
    relation = metadata["relation"]
    for chosen in itertools.product(*matches):
        if len(set(map(id, chosen))) == len(chosen) and (not relation or relation in relations(*chosen[:2])):
            return None
    if relation:
        return f"asked {_names(metadata)}, found the {metadata['objects'][0]['shape']} elsewhere"
    return f"asked {_names(metadata)}, found {_listing(things)}"


def _answers(thing: Thing, asked: Metadata) -> bool:
    return (
        thing.shape == asked["shape"]
        and asked["colour"] in (None, thing.colour)
        and ("size" not in asked or asked["size"] in (None, thing.size))
    )


def _names(metadata: Metadata) -> str:
    return f" {metadata['relation'] or 'and'} ".join(_name(asked) for asked in metadata["objects"])


def _name(asked: Metadata) -> str:
    name = " ".join(part for part in (asked.get("size"), asked["colour"], asked["shape"]) if part)
    return f"{asked['count']} {plural(name)}" if asked["count"] > 1 else f"a {name}"


def _listing(things: tuple[Thing, ...]) -> str:
    """Like "2 red circles, 1 unclear object"."""
    names: dict[str, int] = {}
    for thing in things:
        name = f"{thing.size} {thing.colour or 'unclear-coloured'} {thing.shape}" if thing.shape else "unclear object"
        names[name] = names.get(name, 0) + 1
    return ", ".join(f"{n} {plural(name) if n > 1 else name}" for name, n in names.items())


def _as_dict(thing: Thing) -> Metadata:
    centre, box = (thing.x, thing.y), thing.box
    return {"shape": thing.shape, "colour": thing.colour, "size": thing.size, "centre": centre, "box": box}
