"""Score whether an image shows the objects that a GenEval prompt asks for. A detector finds
objects, the official rules (`geneval_rules`) decide, with the official thresholds: confidence above
0.3, for counting 0.9, at most sixteen objects of a class.

`scoring=shaped`, the default, is the fraction of the requirements that are met: it differs between
images of a group long before one of them is correct, and is 1 exactly where the benchmark says
"correct". `scoring=correct` is the benchmark's 0 or 1. The parts contain both, so that a run that
trains on the one logs the other.

Detectors (options `detector`, `path`, `colour_path`):

    shapes          the classical one of the embedded data set: six shapes in six colours; square
                    images
    transformers    an instance segmentation model and a CLIP that names colours, both in local
                    directories
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from blip3o_jax.config import UserError
from blip3o_jax.data.shapes.detect import detect
from blip3o_jax.data.shapes.vocabulary import COLOURS, SHAPES
from blip3o_jax.rl.rewards.geneval_rules import Found, apply_rules, check_metadata, keep
from blip3o_jax.rl.rewards.options import choice, number
from blip3o_jax.rl.rewards.reward import Scores


class Detector(Protocol):
    """Find objects in a uint8 RGB image [H, W, 3], and name the colours of objects of one class."""

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def colours(self) -> Sequence[str]: ...

    def detect(self, image_HWC: np.ndarray) -> list[Found]: ...

    def colours_of(self, image_HWC: np.ndarray, found: Sequence[Found]) -> list[str | None]: ...


def create(
    detector: str = "shapes",
    path: str = "",
    colour_path: str = "",
    scoring: str = "shaped",
    threshold: str = "0.3",
    counting_threshold: str = "0.9",
    max_objects: str = "16",
) -> "Geneval":
    """Make the reward for the registry."""
    low = number("geneval", "threshold", threshold, float, 0, 1)
    counting = number("geneval", "counting_threshold", counting_threshold, float, 0, 1)
    sees: Detector = ShapesDetector()
    if choice("geneval", "detector", detector, ("shapes", "transformers")) == "transformers":
        from blip3o_jax.rl.rewards.segmentation import SegmentationDetector

        sees = SegmentationDetector(path, colour_path, min(low, counting))
    elif path or colour_path:
        raise UserError(
            "reward geneval: path and colour_path belong to detector=transformers; detector=shapes "
            "has no weights"
        )
    return Geneval(
        sees,
        shaped=choice("geneval", "scoring", scoring, ("shaped", "correct")) == "shaped",
        threshold=low,
        counting_threshold=counting,
        max_objects=number("geneval", "max_objects", max_objects, int, 1, 1000),
    )


@dataclasses.dataclass(frozen=True)
class Geneval:
    """Score by GenEval's rules. Parts: `correct` (0 or 1) and `shaped` (the fraction that is
    met)."""

    detector: Detector
    shaped: bool = True
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        try:
            check_metadata(metadata, self.detector.classes, self.detector.colours)
        except UserError as error:
            raise UserError(f"{error} (prompt {prompt[:80]!r})") from None

    def __call__(
        self, images_BHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        del prompts
        results = []
        for image_HWC, asked in zip(images_BHWC, metadata, strict=True):
            threshold = self.counting_threshold if asked["tag"] == "counting" else self.threshold
            objects = keep(self.detector.detect(image_HWC), threshold, self.max_objects)
            results.append(
                apply_rules(objects, asked, functools.partial(self.detector.colours_of, image_HWC))
            )
        correct_B = np.array([result.correct for result in results], np.float32)
        shaped_B = np.array([result.met for result in results], np.float32)
        return Scores(
            shaped_B if self.shaped else correct_B, {"correct": correct_B, "shaped": shaped_B}
        )


class ShapesDetector:
    """Detect with the classical detector of the shapes data set. Its confidence is 1 for all
    recognised objects; of several objects of a shape the largest counts as the surest."""

    classes, colours = SHAPES, tuple(COLOURS)

    def detect(self, image_HWC: np.ndarray) -> list[Found]:
        side = image_HWC.shape[0]
        things = sorted(detect(image_HWC).things, key=lambda thing: -thing.side)
        return [
            Found(thing.shape, tuple(side * edge for edge in thing.box), colour=thing.colour)
            for thing in things
            if thing.shape is not None
        ]

    def colours_of(self, image_HWC: np.ndarray, found: Sequence[Found]) -> list[str | None]:
        del image_HWC
        return [thing.colour for thing in found]
